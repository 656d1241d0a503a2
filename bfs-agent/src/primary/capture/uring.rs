//! Where the fields of io_uring's structs are, and under which names its tracepoints can be had.

use bfs_common::abi::Offsets;

use super::CaptureError;
use super::btf::KernelTypes;

/// The probes of io_uring, each with the names that its tracepoint has or had. They are there on
/// kernels that have io_uring.
pub const PROGRAMS: [(&str, &[&str]); 3] = [
    ("io_uring_create", &["io_uring_create"]),
    ("io_uring_complete", &["io_uring_complete"]),
    // Until 6.2 or so the second name.
    ("io_uring_submit_req", &["io_uring_submit_req", "io_uring_submit_sqe"]),
];

/// The tracepoint of a probe on this kernel.
pub fn tracepoint(types: &KernelTypes, names: &'static [&'static str]) -> Result<&'static str, CaptureError> {
    names
        .iter()
        .find(|name| types.trace_arguments(name).is_some())
        .copied()
        .ok_or(CaptureError::MissingField { composite: "tracepoint", field: names[0] })
}

/// Fills in what the probes need of io_uring.
pub fn offsets(types: &KernelTypes, found: Offsets) -> Result<Offsets, CaptureError> {
    let one = |composite, field| types.any(composite, &[field]);
    // Fixed files stood in the table themselves before 6.13, then in nodes.
    let nodes = types.offset("io_ring_ctx", "file_table.data.nodes");
    let (ring_files, ring_files_count, node_file) = match nodes {
        Some(nodes) => (nodes, one("io_ring_ctx", "file_table.data.nr")?, one("io_rsrc_node", "file_ptr")?),
        None => (one("io_ring_ctx", "file_table.files")?, one("io_ring_ctx", "nr_user_files")?, 0),
    };
    Ok(Offsets {
        uring_cqe: u32::from(types.trace_arguments("io_uring_complete") == Some(3)),
        req_file: one("io_kiocb", "file")?,
        req_opcode: one("io_kiocb", "opcode")?,
        req_flags: one("io_kiocb", "flags")?,
        req_fd: one("io_kiocb", "cqe.fd")?,
        req_ctx: one("io_kiocb", "ctx")?,
        req_async_data: one("io_kiocb", "async_data")?,
        ring_link_head: one("io_ring_ctx", "submit_state.link.head")?,
        ring_has_nodes: u32::from(nodes.is_some()),
        ring_files,
        ring_files_count,
        node_file,
        rw_pos: one("io_rw", "kiocb.ki_pos")?,
        rw_len: one("io_rw", "len")?,
        rw_flags: one("io_rw", "flags")?,
        splice_off_out: one("io_splice", "off_out")?,
        splice_len: one("io_splice", "len")?,
        madvise_advice: one("io_madvise", "advice")?,
        open_dfd: one("io_open", "dfd")?,
        open_name: one("io_open", "filename")?,
        open_flags: one("io_open", "how.flags")?,
        rename_old_dfd: one("io_rename", "old_dfd")?,
        rename_new_dfd: one("io_rename", "new_dfd")?,
        rename_old: one("io_rename", "oldpath")?,
        rename_new: one("io_rename", "newpath")?,
        rename_flags: one("io_rename", "flags")?,
        unlink_dfd: one("io_unlink", "dfd")?,
        unlink_name: one("io_unlink", "filename")?,
        mkdir_dfd: one("io_mkdir", "dfd")?,
        mkdir_name: one("io_mkdir", "filename")?,
        link_old_dfd: one("io_link", "old_dfd")?,
        link_new_dfd: one("io_link", "new_dfd")?,
        link_old: one("io_link", "oldpath")?,
        link_new: one("io_link", "newpath")?,
        link_flags: one("io_link", "flags")?,
        xattr_name: one("io_xattr", "filename")?,
        filename_name: one("filename", "name")?,
        msg_addr: one("io_async_msghdr", "addr")?,
        // bind came with 6.11.
        bind_addr_len: types.offset("io_bind", "addr_len").unwrap_or(0),
        ..found
    })
}
