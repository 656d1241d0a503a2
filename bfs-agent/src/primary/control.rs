//! The socket through which commands reach a running agent.
