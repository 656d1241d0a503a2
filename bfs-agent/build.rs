fn main() {
    let out = std::env::var("OUT_DIR").unwrap();
    std::fs::copy("../bfs-ebpf/target/bpfel-unknown-none/release/bfs-ebpf", format!("{out}/bfs-ebpf")).unwrap();
    println!("cargo::rerun-if-changed=../bfs-ebpf/target/bpfel-unknown-none/release/bfs-ebpf");
}
