//! Stopping the selected processes for a moment, and the guard that lets them go.
