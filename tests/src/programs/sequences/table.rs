//! Which operations there are, over a small universe of names.
//!
//! Each sequence has a directory of its own, made by [`super::site`]: files `a` (held open) and `b`
//! (also `d/x`), directories `d` (not empty) and `e` (empty), a symlink `l` to `a`, nothing at `n` and
//! `d/n`; and outside of the replicated directory `O/o`, `O/d` and nothing at `O/n`.

/// One operation, as text: `VERB`, `VERB:NAME` or `VERB:NAME:NAME`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// What is done.
    pub verb: &'static str,
    /// To what, or from where; empty for what is done to the file that is held open.
    pub one: &'static str,
    /// To where.
    pub two: &'static str,
}

/// No operation: where a sequence has its checkpoint.
pub const CHECKPOINT: Operation = Operation { verb: "checkpoint", one: "", two: "" };

/// The names of the universe.
const NAMES: [&str; 11] = ["a", "b", "d", "d/x", "e", "l", "n", "d/n", "O/o", "O/d", "O/n"];

/// Done to the descriptor that is open on `a`.
const BY_DESCRIPTOR: [&str; 46] = [
    "pwrite-begin",
    "pwrite-middle",
    "pwrite-end",
    "pwrite-beyond",
    "pwrite-large",
    "write-at-position",
    "write-nothing",
    "writev",
    "pwritev2-append",
    "write-appending",
    "write-by-duplicate",
    "write-by-child",
    "write-by-proc",
    "write-direct",
    "write-sync",
    "write-bad-buffer",
    "writev-half-bad",
    "ftruncate-zero",
    "ftruncate-short",
    "ftruncate-long",
    "fallocate",
    "fallocate-keep",
    "fallocate-punch",
    "fallocate-zero",
    "fallocate-zero-keep",
    "fallocate-collapse",
    "fallocate-insert",
    "fallocate-too-much",
    "sendfile",
    "splice",
    "vmsplice",
    "copy-range",
    "copy-range-self",
    "clone",
    "fchmod",
    "fchmod-setuid",
    "fchown",
    "futimens",
    "fsetxattr",
    "fremovexattr",
    "capability",
    "set-flags",
    "fsync",
    "reopen-truncated",
    "link-descriptor",
    "link-proc-descriptor",
];

/// Stores by mappings: these make a checkpoint stop the program, so they have sessions of their own.
const MAPPED: [&str; 5] = ["map-store", "map-store-sync", "map-keep", "map-private", "map-append"];

/// With one name.
const ONE_NAME: [&str; 26] = [
    "create",
    "create-exclusive",
    "create-truncating",
    "create-write",
    "open-append",
    "temporary-link",
    "mkdir",
    "rmdir",
    "unlink",
    "symlink",
    "fifo",
    "device",
    "mknod-file",
    "socket",
    "chmod",
    "lchown",
    "utimens",
    "utimens-link",
    "truncate-short",
    "truncate-long",
    "setxattr",
    "lsetxattr",
    "removexattr",
    "acl",
    "default-acl",
    "unlink-and-write",
];

/// With two names.
const TWO_NAMES: [&str; 5] = ["rename", "rename-keeping", "exchange", "whiteout", "link"];

/// Operations that pairs are made of: each verb with the names that matter to it most.
const CORE_ONE: [(&str, &[&str]); 26] = [
    ("create", &["n"]),
    ("create-exclusive", &["a", "d/n"]),
    ("create-truncating", &["b"]),
    ("create-write", &["n", "b", "l"]),
    ("open-append", &["b"]),
    ("temporary-link", &["n"]),
    ("mkdir", &["n", "d/n"]),
    ("rmdir", &["e", "d"]),
    ("unlink", &["a", "d/x", "l"]),
    ("symlink", &["n"]),
    ("fifo", &["n"]),
    ("device", &["n"]),
    ("mknod-file", &["n"]),
    ("socket", &["d/n"]),
    ("chmod", &["d", "l"]),
    ("lchown", &["l"]),
    ("utimens", &["d"]),
    ("utimens-link", &["l"]),
    ("truncate-short", &["b", "l"]),
    ("truncate-long", &["d/x"]),
    ("setxattr", &["b", "d"]),
    ("lsetxattr", &["l"]),
    ("removexattr", &["a"]),
    ("acl", &["b"]),
    ("default-acl", &["d"]),
    ("unlink-and-write", &["b"]),
];

const CORE_TWO: [(&str, &[(&str, &str)]); 5] = [
    (
        "rename",
        &[
            ("a", "n"),
            ("a", "b"),
            ("b", "d/x"),
            ("d", "n"),
            ("d", "e"),
            ("l", "a"),
            ("e", "d/n"),
            ("a", "O/n"),
            ("d", "O/n"),
            ("O/o", "a"),
            ("O/d", "n"),
        ],
    ),
    ("rename-keeping", &[("a", "n"), ("a", "b")]),
    ("exchange", &[("a", "b"), ("a", "d"), ("d", "e"), ("d/x", "O/o"), ("d", "O/d")]),
    ("whiteout", &[("a", "n")]),
    ("link", &[("a", "n"), ("a", "d/n"), ("a", "O/n"), ("O/o", "n"), ("l", "n")]),
];

/// Every operation.
#[must_use]
pub fn all(mapped: bool) -> Vec<Operation> {
    let mut all = by_descriptor(mapped);
    for verb in ONE_NAME {
        all.extend(NAMES.map(|one| Operation { verb, one, two: "" }));
    }
    for verb in TWO_NAMES {
        for one in NAMES {
            all.extend(NAMES.map(|two| Operation { verb, one, two }));
        }
    }
    all
}

/// What pairs are made of.
#[must_use]
pub fn core(mapped: bool) -> Vec<Operation> {
    let mut core = by_descriptor(mapped);
    for (verb, names) in CORE_ONE {
        core.extend(names.iter().map(|one| Operation { verb, one, two: "" }));
    }
    for (verb, pairs) in CORE_TWO {
        core.extend(pairs.iter().map(|(one, two)| Operation { verb, one, two }));
    }
    core
}

fn by_descriptor(mapped: bool) -> Vec<Operation> {
    let more: &[&str] = if mapped { &MAPPED } else { &[] };
    BY_DESCRIPTOR.iter().chain(more).map(|verb| Operation { verb, one: "", two: "" }).collect()
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.verb)?;
        [self.one, self.two].iter().filter(|n| !n.is_empty()).try_for_each(|name| write!(f, ":{name}"))
    }
}

/// The operation of a text that [`Operation`]'s `Display` made.
#[must_use]
pub fn parse(text: &str) -> Option<Operation> {
    let all = all(true).into_iter().chain([CHECKPOINT]);
    all.into_iter().find(|operation| operation.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_operations_are_among_all_and_texts_are_read_back() {
        let all = all(true);
        for operation in core(true) {
            assert!(all.contains(&operation), "{operation}");
            assert_eq!(parse(&operation.to_string()), Some(operation));
        }
        assert_eq!(parse("rename:a:nowhere"), None);
    }
}
