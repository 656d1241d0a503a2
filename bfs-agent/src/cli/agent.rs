//! Command line of `bfs-agent`.
