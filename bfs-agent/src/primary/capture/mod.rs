//! The probes: loading, pinning, the ring and the maps.
