//! `bfs-agent`: the primary's daemon and its commands. Everything is in the library.

fn main() -> std::process::ExitCode {
    bfs_agent::cli::agent::main().into()
}
