//! The replayer's command; all of it is in the library.

fn main() -> std::process::ExitCode {
    bfs_agent::cli::replayer::main()
}
