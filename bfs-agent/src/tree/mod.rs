//! Reading files and attributes: what both roles need.
