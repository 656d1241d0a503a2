//! Command line of `bfs-replayer`.
