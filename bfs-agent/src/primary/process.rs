//! The selected processes: starting the command of `run`, finding the tree of `attach`.
