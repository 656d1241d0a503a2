//! Where the fields of the kernel's structs are, from the running kernel's BTF.
//!
//! The format is `Documentation/bpf/btf.rst` of the kernel. Members are found through anonymous
//! structs and unions; where kernels differ, [`offsets`] tries the alternatives in turn. A field
//! that is nowhere is a typed error that names it: no kernel is told by its version number.

use std::{collections::HashMap, path::Path};

use bfs_common::abi::Offsets;

use super::CaptureError;

/// The kernel's own BTF.
pub const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;

/// A member of a struct or union.
#[derive(Clone, Copy)]
struct Member {
    name: u32,
    type_id: u32,
    bits: u32,
}

enum Type {
    Composite {
        first: usize,
        count: usize,
    },
    /// typedef, const, volatile, restrict, type tag: stands for another type.
    Alias(u32),
    Pointer(u32),
    /// A function with so many parameters.
    Function(usize),
    Other,
}

/// The types of a kernel.
pub struct KernelTypes {
    strings: Vec<u8>,
    types: Vec<Type>,
    members: Vec<Member>,
    structs: HashMap<Vec<u8>, u32>,
    /// Name, names and values.
    enums: HashMap<Vec<u8>, Vec<(u32, u32)>>,
    /// The types of tracepoints, `btf_trace_NAME`.
    traces: HashMap<Vec<u8>, u32>,
}

/// What the kernel calls the types of tracepoints.
const TRACE: &[u8] = b"btf_trace_";

impl KernelTypes {
    /// Reads the types from `path`, usually [`KERNEL_BTF`], and those of btrfs, which is a module in most kernels, beside it.
    pub fn read(path: &Path) -> Result<Self, CaptureError> {
        let no = |path: &Path, reason: String| CaptureError::NoBtf { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(|source| no(path, source.to_string()))?;
        let wrong = |path: &Path| no(path, "it is not in the BTF format".to_owned());
        let mut types = Self::parse(&bytes).ok_or_else(|| wrong(path))?;
        let module = path.with_file_name("btrfs");
        match std::fs::read(&module) {
            Ok(bytes) => types.extend(&bytes).ok_or_else(|| wrong(&module))?,
            // A part of the kernel, or not loaded.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(no(&module, error.to_string())),
        }
        Ok(types)
    }

    /// Takes BTF apart; `None` if it is malformed.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut this = Self {
            strings: Vec::new(),
            // Type 0 is void.
            types: vec![Type::Other],
            members: Vec::new(),
            structs: HashMap::new(),
            enums: HashMap::new(),
            traces: HashMap::new(),
        };
        this.extend(bytes)?;
        Some(this)
    }

    /// Takes in the types of a module, whose numbers and strings go on where the kernel's end.
    fn extend(&mut self, bytes: &[u8]) -> Option<()> {
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        if u16::from_le_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header = word(4)? as usize;
        let section = |offset: u32, len: u32| {
            let start = header.checked_add(offset as usize)?;
            bytes.get(start..start.checked_add(len as usize)?)
        };
        self.strings.extend_from_slice(section(word(16)?, word(20)?)?);
        let mut rest = section(word(8)?, word(12)?)?;
        while !rest.is_empty() {
            let head: [u32; 3] = take(&mut rest)?;
            let [name, info, size_or_type] = head;
            let count = (info & 0xffff) as usize;
            let kind = info >> 24 & 0x1f;
            let bitfields = info >> 31 != 0;
            let id = u32::try_from(self.types.len()).ok()?;
            let parsed = match kind {
                STRUCT | UNION => {
                    let first = self.members.len();
                    for _ in 0..count {
                        let [name, type_id, offset] = take(&mut rest)?;
                        let bits = if bitfields { offset & 0xff_ffff } else { offset };
                        self.members.push(Member { name, type_id, bits });
                    }
                    if let Some(name) = self.string(name).filter(|name| !name.is_empty()) {
                        let name = name.to_vec();
                        // The first one counts: later ones of the same name are of some driver.
                        if count > 0 {
                            self.structs.entry(name).or_insert(id);
                        }
                    }
                    Type::Composite { first, count }
                }
                // typedef, volatile, const, restrict, type tag
                8..=11 | 18 => {
                    let trace =
                        self.string(name).and_then(|name| name.strip_prefix(TRACE)).map(<[u8]>::to_vec);
                    if let Some(trace) = trace {
                        self.traces.insert(trace, size_or_type);
                    }
                    Type::Alias(size_or_type)
                }
                // int, var, declaration tag: one word more
                1 | 14 | 17 => skip(&mut rest, 4)?,
                // array: three words
                3 => skip(&mut rest, 12)?,
                ENUM => {
                    let mut values = Vec::with_capacity(count);
                    for _ in 0..count {
                        let [name, value] = take(&mut rest)?;
                        values.push((name, value));
                    }
                    if let Some(name) = self.string(name).filter(|name| !name.is_empty()) {
                        let name = name.to_vec();
                        self.enums.entry(name).or_insert(values);
                    }
                    Type::Other
                }
                // function prototype: two words each
                13 => {
                    skip(&mut rest, 8 * count)?;
                    Type::Function(count)
                }
                // data section, 64-bit enum: three words each
                15 | 19 => skip(&mut rest, 12 * count)?,
                2 => Type::Pointer(size_or_type),
                // forward, function, float
                7 | 12 | 16 => Type::Other,
                _ => return None,
            };
            self.types.push(parsed);
        }
        Some(())
    }

    fn string(&self, offset: u32) -> Option<&[u8]> {
        let rest = self.strings.get(offset as usize..)?;
        Some(&rest[..rest.iter().position(|&byte| byte == 0)?])
    }

    /// Byte offset of a member, `a.b` meaning member `b` of member `a`; `None` if there is none.
    #[must_use]
    pub fn offset(&self, composite: &str, path: &str) -> Option<u32> {
        let mut id = *self.structs.get(composite.as_bytes())?;
        let mut bits = 0;
        for name in path.split('.') {
            let (member_bits, member_type) = self.member(id, name.as_bytes())?;
            bits += member_bits;
            id = self.resolve(member_type)?;
        }
        (bits % 8 == 0).then_some(bits / 8)
    }

    /// Value of a name of an enum.
    #[must_use]
    pub fn enumerator(&self, of: &str, name: &str) -> Option<u32> {
        let values = self.enums.get(of.as_bytes())?;
        values.iter().find(|(n, _)| self.string(*n) == Some(name.as_bytes())).map(|(_, value)| *value)
    }

    /// How many arguments a tracepoint has; `None` if the kernel has no such tracepoint.
    #[must_use]
    pub fn trace_arguments(&self, name: &str) -> Option<usize> {
        let id = self.resolve(*self.traces.get(name.as_bytes())?)?;
        let Type::Pointer(function) = *self.types.get(id as usize)? else { return None };
        match self.types.get(self.resolve(function)? as usize)? {
            // The first one is the probe's own data.
            Type::Function(parameters) => parameters.checked_sub(1),
            _ => None,
        }
    }

    fn resolve(&self, mut id: u32) -> Option<u32> {
        // Bounded, in case the types go round in a circle.
        for _ in 0..32 {
            match self.types.get(id as usize)? {
                Type::Alias(target) => id = *target,
                _ => return Some(id),
            }
        }
        None
    }

    fn member(&self, id: u32, name: &[u8]) -> Option<(u32, u32)> {
        let Type::Composite { first, count } = *self.types.get(id as usize)? else {
            return None;
        };
        let members = self.members.get(first..first + count)?;
        for member in members {
            if self.string(member.name)? == name {
                return Some((member.bits, member.type_id));
            }
        }
        for member in members.iter().filter(|member| self.string(member.name) == Some(b"".as_slice())) {
            let inner = self.resolve(member.type_id)?;
            if let Some((bits, type_id)) = self.member(inner, name) {
                return Some((member.bits + bits, type_id));
            }
        }
        None
    }

    /// The offset of the first of several members that exists.
    pub(super) fn any(&self, composite: &'static str, paths: &[&'static str]) -> Result<u32, CaptureError> {
        paths.iter().find_map(|path| self.offset(composite, path)).ok_or(CaptureError::MissingField {
            composite,
            field: paths.first().copied().unwrap_or_default(),
        })
    }
}

/// Whether btrfs is a part of the kernel, and no module.
#[must_use]
pub fn kernel_has_btrfs(path: &Path) -> bool {
    let types = std::fs::read(path).ok().and_then(|bytes| KernelTypes::parse(&bytes));
    types.is_some_and(|types| types.offset("btrfs_inode", "root").is_some())
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u32; N]> {
    let (head, tail) = rest.split_at_checked(4 * N)?;
    *rest = tail;
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(head.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().ok()?);
    }
    Some(words)
}

fn skip(rest: &mut &[u8], len: usize) -> Option<Type> {
    *rest = rest.get(len..)?;
    Some(Type::Other)
}

/// The offsets that the probes need.
pub fn offsets(types: &KernelTypes) -> Result<Offsets, CaptureError> {
    let one = |composite, field| types.any(composite, &[field]);
    // file_ref_t counts from 0 (include/linux/file_ref.h), f_count from 1.
    let (file_count, file_count_one) = match types.offset("file", "f_ref") {
        Some(offset) => (offset, 0),
        None => (one("file", "f_count")?, 1),
    };
    let (mtime_sec, mtime_nsec) = match types.offset("inode", "i_mtime_sec") {
        Some(seconds) => (seconds, one("inode", "i_mtime_nsec")?),
        // A timespec64 until 6.10: seconds and nanoseconds of 8 bytes each.
        None => {
            let start = types.any("inode", &["i_mtime", "__i_mtime"])?;
            (start, start + 8)
        }
    };
    let btrfs_root = match (types.offset("btrfs_inode", "root"), types.offset("btrfs_inode", "vfs_inode")) {
        (Some(root), Some(inode)) => root.cast_signed() - inode.cast_signed(),
        _ => 0,
    };
    // Without either a folio counts as one of the largest size.
    let pages = types.any("folio", &["_nr_pages", "_folio_nr_pages"]).ok();
    let (folio_pages, folio_head) = pages.zip(types.enumerator("pageflags", "PG_head")).unwrap_or((0, 0));
    let found = Offsets {
        task_files: one("task_struct", "files")?,
        task_fs: one("task_struct", "fs")?,
        task_mm: one("task_struct", "mm")?,
        task_pid: one("task_struct", "pid")?,
        task_tgid: one("task_struct", "tgid")?,
        task_status: one("task_struct", "thread_info.status")?,
        task_signal: one("task_struct", "signal")?,
        signal_live: one("signal_struct", "live")?,
        signal_exit_code: one("signal_struct", "group_exit_code")?,
        task_nsproxy: one("task_struct", "nsproxy")?,
        nsproxy_mounts: one("nsproxy", "mnt_ns")?,
        mounts_number: one("mnt_namespace", "ns.inum")?,
        mm_users: one("mm_struct", "mm_users")?,
        task_io_uring: types.offset("task_struct", "io_uring").unwrap_or(0),
        mm_aio: types.offset("mm_struct", "ioctx_table").unwrap_or(0),
        files_count: one("files_struct", "count")?,
        files_fdt: one("files_struct", "fdt")?,
        files_fd_array: one("files_struct", "fd_array")?,
        fdt_max_fds: one("fdtable", "max_fds")?,
        fdt_fd: one("fdtable", "fd")?,
        fs_root: one("fs_struct", "root")?,
        fs_pwd: one("fs_struct", "pwd")?,
        fs_users: one("fs_struct", "users")?,
        path_dentry: one("path", "dentry")?,
        file_inode: one("file", "f_inode")?,
        file_pos: one("file", "f_pos")?,
        file_flags: one("file", "f_flags")?,
        file_mode: one("file", "f_mode")?,
        file_path: one("file", "f_path")?,
        file_count,
        file_count_one,
        inode_mode: one("inode", "i_mode")?,
        inode_uid: one("inode", "i_uid")?,
        inode_gid: one("inode", "i_gid")?,
        inode_sb: one("inode", "i_sb")?,
        inode_ino: one("inode", "i_ino")?,
        inode_nlink: types.any("inode", &["i_nlink", "__i_nlink"])?,
        inode_size: one("inode", "i_size")?,
        inode_mtime_sec: mtime_sec,
        inode_mtime_nsec: mtime_nsec,
        inode_generation: one("inode", "i_generation")?,
        sb_dev: one("super_block", "s_dev")?,
        sb_magic: one("super_block", "s_magic")?,
        dentry_parent: one("dentry", "d_parent")?,
        dentry_name: types.any("dentry", &["d_name", "__d_name"])?,
        dentry_inode: one("dentry", "d_inode")?,
        qstr_len: one("qstr", "len")?,
        qstr_name: one("qstr", "name")?,
        vma_start: one("vm_area_struct", "vm_start")?,
        vma_end: one("vm_area_struct", "vm_end")?,
        vma_flags: types.any("vm_area_struct", &["vm_flags", "__vm_flags"])?,
        vma_file: one("vm_area_struct", "vm_file")?,
        btrfs_root,
        btrfs_anon_dev: if btrfs_root == 0 { 0 } else { one("btrfs_root", "anon_dev")? },
        task_flags: one("task_struct", "flags")?,
        task_thread_node: one("task_struct", "thread_node")?,
        signal_thread_head: one("signal_struct", "thread_head")?,
        task_cgroups: one("task_struct", "cgroups")?,
        css_set_cgroup: one("css_set", "dfl_cgrp")?,
        cgroup_level: one("cgroup", "level")?,
        cgroup_ancestors: one("cgroup", "ancestors")?,
        cgroup_node: one("cgroup", "kn")?,
        node_id: one("kernfs_node", "id")?,
        inode_dio_count: one("inode", "i_dio_count")?,
        inode_mapping: one("inode", "i_mapping")?,
        mapping_host: one("address_space", "host")?,
        mapping_writable: one("address_space", "i_mmap_writable")?,
        folio_index: one("folio", "index")?,
        folio_pages,
        folio_head,
        inode_aliases: one("inode", "i_dentry")?,
        inode_self: one("inode", "i_data.host")?,
        inode_writers: one("inode", "i_writecount")?,
        dentry_alias: types.any("dentry", &["d_u.d_alias", "d_alias"])?,
        sb_root: one("super_block", "s_root")?,
        ..Offsets::default()
    };
    if found.task_io_uring == 0 { Ok(found) } else { super::uring::offsets(types, found) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The offsets of 6.18 in which it differs from 6.1, 6.12 and 7.2.
    #[test]
    fn this_kernels_fields_are_found() {
        let types = KernelTypes::read(Path::new(KERNEL_BTF)).expect("this test needs a kernel with BTF");
        let found = offsets(&types).expect("all fields");
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("procfs");
        if release.starts_with("6.18.") {
            assert_eq!(
                (found.file_inode, found.file_pos, found.file_flags, found.file_mode),
                (32, 112, 40, 4)
            );
            assert_eq!((found.file_path, found.path_dentry), (64, 8));
            assert_eq!((found.inode_mode, found.inode_uid, found.inode_sb), (0, 4, 40));
            assert_eq!((found.inode_ino, found.inode_size, found.inode_generation), (64, 80, 124));
            assert_eq!((found.inode_mtime_sec, found.inode_mtime_nsec), (96, 116));
            assert_eq!((found.dentry_parent, found.dentry_name, found.dentry_inode), (24, 32, 48));
            assert_eq!((found.vma_file, found.vma_flags), (88, 32));
            assert_eq!(found.file_count_one, 0);
            assert_eq!((found.folio_index, found.folio_head, found.mapping_writable), (32, 6, 68));
            assert!(found.folio_pages > 64);
            assert_eq!((found.req_file, found.req_opcode, found.uring_cqe), (0, 64, 1));
            assert_eq!(types.trace_arguments("io_uring_complete"), Some(3));
            assert_eq!(types.trace_arguments("io_uring_submit_req"), Some(1));
            assert_eq!(types.trace_arguments("io_uring_submit_sqe"), None);
        }
    }

    /// BTF of these strings and types; each type is words.
    fn btf(strings: &[u8], types: &[u32]) -> Vec<u8> {
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut out = MAGIC.to_le_bytes().to_vec();
        out.extend([1, 0]);
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            out.extend(word.to_le_bytes());
        }
        [&out[..], &types, strings].concat()
    }

    #[test]
    fn types_of_a_module_go_on_where_the_kernels_end() {
        let composite = |members: u32| STRUCT << 24 | members;
        let kernel = btf(b"\0inode\0i_ino\0", &[1, composite(1), 8, 7, 0, 64]);
        let base = 13;
        // A root, a pointer to it (type 3), and what has that and an inode (type 1).
        let module = btf(
            b"btrfs_root\0anon_dev\0btrfs_inode\0root\0vfs_inode\0",
            &[
                &[base, composite(1), 8, base + 11, 0, 32][..],
                &[0, 2 << 24, 2],
                &[base + 20, composite(2), 24, base + 32, 3, 0, base + 37, 1, 64],
            ]
            .concat(),
        );
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vmlinux");
        std::fs::write(&path, &kernel).unwrap();
        assert_eq!(KernelTypes::read(&path).unwrap().offset("btrfs_inode", "root"), None);
        std::fs::write(folder.path().join("btrfs"), &module).unwrap();
        let types = KernelTypes::read(&path).unwrap();
        let offsets = ["root", "vfs_inode", "vfs_inode.i_ino"].map(|of| types.offset("btrfs_inode", of));
        assert_eq!(offsets, [Some(0), Some(8), Some(16)]);
        assert_eq!(types.offset("btrfs_root", "anon_dev"), Some(4));
        assert_eq!(types.offset("inode", "i_ino"), Some(8));
        std::fs::write(folder.path().join("btrfs"), b"nonsense").unwrap();
        assert!(matches!(KernelTypes::read(&path), Err(CaptureError::NoBtf { .. })));
    }

    #[test]
    fn a_kernel_without_btf_is_a_typed_error() {
        let error = KernelTypes::read(Path::new("/nonexistent")).err();
        assert!(matches!(error, Some(CaptureError::NoBtf { .. })));
        assert!(KernelTypes::parse(b"\x9f\xeb garbage").is_none());
        assert!(KernelTypes::parse(b"").is_none());
    }
}
