//! What is left out in some of the runs, said once as patterns and once as plain conditions.

use bfs_common::record::FileKind;

use crate::primary::engine::filter::Filter;

/// What the group takes.
#[derive(Clone, Copy)]
pub(super) enum Border {
    Everything,
    /// No `d`.
    NoName,
    /// No `b` in an `a` at the top, and no `d` in any `c`.
    NoPlace,
    /// Files only that are called `a`, or stand below one; and no `d`.
    OnlyName,
}

impl Border {
    pub(super) fn of(seed: u64) -> Self {
        match seed % 8 {
            1 => Self::NoName,
            3 => Self::NoPlace,
            6 => Self::OnlyName,
            _ => Self::Everything,
        }
    }

    pub(super) fn filter(self) -> Filter {
        let (include, exclude): (&[&str], &[&str]) = match self {
            Self::Everything => (&[], &[]),
            Self::NoName => (&[], &["d"]),
            Self::NoPlace => (&[], &["/a/b", "**/c/d"]),
            Self::OnlyName => (&["a"], &["d"]),
        };
        let list = |patterns: &[&str]| patterns.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
        Filter::new(&list(include), &list(exclude)).expect("patterns")
    }

    /// Whether an entry is taken whose directory is; the path begins with a slash.
    pub(super) fn takes(self, path: &str, kind: FileKind) -> bool {
        match self {
            Self::Everything => true,
            Self::NoName => !path.ends_with("/d"),
            Self::NoPlace => path != "/a/b" && !path.ends_with("/c/d"),
            Self::OnlyName => {
                !path.ends_with("/d")
                    && (kind == FileKind::Directory || path.split('/').any(|part| part == "a"))
            }
        }
    }
}
