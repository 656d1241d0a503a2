//! Addresses, frames and authentication of the connection between agent and replayer.
