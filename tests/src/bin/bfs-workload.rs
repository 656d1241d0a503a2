//! The numbered programs that the tests replicate: see `bfs_tests::programs`.

fn main() -> anyhow::Result<()> {
    bfs_tests::programs::main(&std::env::args().skip(1).collect::<Vec<_>>())
}
