//! What below the roots belongs to the group: `--include` and `--exclude`. Pure.
//!
//! An entry that a pattern of `--exclude` matches is left out, with all below it. Where there are patterns of
//! `--include`, of what is left only those files belong to the group that one of them matches, or a directory
//! above them; directories always do, so that there is a place for what is below. A pattern without a slash is
//! matched with names, one with a slash with the path below the root; `*` and `?` match no slash, `**` does.

use std::path::{Path, PathBuf};

use bfs_common::record::{FileKind, Name};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

/// Patterns that are matched with names, and those that are matched with paths.
#[derive(Clone, Debug, Default)]
struct Patterns {
    names: GlobSet,
    paths: GlobSet,
}

impl Patterns {
    fn new(patterns: &[String]) -> Result<Self, String> {
        let (mut names, mut paths) = (GlobSetBuilder::new(), GlobSetBuilder::new());
        for pattern in patterns {
            let trimmed = pattern.trim_matches('/');
            if trimmed.is_empty() {
                return Err(format!("the pattern {pattern:?} matches nothing"));
            }
            let glob = GlobBuilder::new(trimmed)
                .literal_separator(true)
                .backslash_escape(true)
                .build()
                .map_err(|e| format!("the pattern {pattern:?}: {}", e.kind()))?;
            // A slash at the beginning ties a name to the root.
            if pattern.starts_with('/') || trimmed.contains('/') {
                paths.add(glob)
            } else {
                names.add(glob)
            };
        }
        let built = |set: GlobSetBuilder| set.build().map_err(|e| e.to_string());
        Ok(Self { names: built(names)?, paths: built(paths)? })
    }

    fn is_empty(&self) -> bool {
        self.names.is_empty() && self.paths.is_empty()
    }

    fn match_name(&self, name: &Path) -> bool {
        !self.names.is_empty() && self.names.is_match(name)
    }

    /// Whether they match the path or a directory above it.
    fn match_above(&self, path: &Path) -> bool {
        path.ancestors().take_while(|at| !at.as_os_str().is_empty()).any(|at| {
            at.file_name().is_some_and(|name| self.match_name(Path::new(name))) || self.paths.is_match(at)
        })
    }
}

/// Whether an entry belongs to the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It does.
    Taken,
    /// If it names a directory.
    IfDirectory,
    /// It does not, whatever it names.
    LeftOut,
}

/// The patterns of a group.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    texts: (Vec<String>, Vec<String>),
    include: Patterns,
    exclude: Patterns,
}

impl Filter {
    /// From the patterns as the user wrote them.
    ///
    /// # Errors
    /// A sentence that names the pattern that is none.
    pub fn new(include: &[String], exclude: &[String]) -> Result<Self, String> {
        Ok(Self {
            texts: (include.to_vec(), exclude.to_vec()),
            include: Patterns::new(include)?,
            exclude: Patterns::new(exclude)?,
        })
    }

    /// The patterns as the user wrote them: included, excluded.
    #[must_use]
    pub fn texts(&self) -> (&[String], &[String]) {
        (&self.texts.0, &self.texts.1)
    }

    /// Whether everything belongs to the group.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty()
    }

    /// Whether the place of a directory decides about what is below it.
    #[must_use]
    pub fn looks_at_paths(&self) -> bool {
        !self.include.is_empty() || !self.exclude.paths.is_empty()
    }

    /// Whether an entry belongs to the group. `path` gives its path below the root; of an entry that has
    /// none any more only the name counts.
    #[must_use]
    pub fn verdict(&self, name: &Name, path: &dyn Fn() -> Option<PathBuf>) -> Verdict {
        if self.exclude.match_name(Path::new(name.as_os_str())) {
            return Verdict::LeftOut;
        }
        let Some(path) = self.looks_at_paths().then(path).flatten() else { return Verdict::Taken };
        if self.exclude.paths.is_match(&path) {
            Verdict::LeftOut
        } else if self.include.is_empty() || self.include.match_above(&path) {
            Verdict::Taken
        } else {
            Verdict::IfDirectory
        }
    }
}

impl Verdict {
    /// Whether an entry that names something of this kind is left out.
    #[must_use]
    pub fn leaves_out(self, kind: FileKind) -> bool {
        match self {
            Self::Taken => false,
            Self::IfDirectory => kind != FileKind::Directory,
            Self::LeftOut => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(include: &[&str], exclude: &[&str], path: &str) -> Verdict {
        let list = |patterns: &[&str]| patterns.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
        let filter = Filter::new(&list(include), &list(exclude)).unwrap();
        let name = Name::new(path.rsplit('/').next().unwrap().as_bytes()).unwrap();
        filter.verdict(&name, &|| Some(path.into()))
    }

    #[test]
    fn patterns_mean_what_is_written_above() {
        use Verdict::{IfDirectory, LeftOut, Taken};
        for (include, exclude, path, expected) in [
            (&[][..], &["*.tmp"][..], "a/b.tmp", LeftOut),
            (&[], &["*.tmp"], "a/b", Taken),
            (&[], &["cache"], "a/cache", LeftOut),
            (&[], &["/cache"], "a/cache", Taken),
            (&[], &["/cache/"], "cache", LeftOut),
            (&[], &["a/*"], "a/b", LeftOut),
            (&[], &["a/*"], "a/b/c", Taken),
            (&[], &["a/**/c"], "a/b/d/c", LeftOut),
            (&[], &["a\\*"], "a*", LeftOut),
            (&[], &["a\\*"], "ab", Taken),
            (&["*.db"], &[], "x/y.db", Taken),
            (&["*.db"], &[], "x/y.log", IfDirectory),
            (&["docs"], &[], "docs/x/y", Taken),
            (&["docs"], &[], "x/docs/y", Taken),
            (&["/docs"], &[], "x/docs/y", IfDirectory),
            (&["x/docs"], &[], "x/docs/y", Taken),
            (&["docs"], &["*.tmp"], "docs/y.tmp", LeftOut),
            (&["y.tmp"], &["*.tmp"], "y.tmp", LeftOut),
            (&[], &[], "x", Taken),
        ] {
            assert_eq!(verdict(include, exclude, path), expected, "{include:?} {exclude:?} {path}");
        }
        assert!(Filter::new(&[], &["[".to_owned()]).unwrap_err().contains("\"[\""));
        assert!(Filter::new(&["/".to_owned()], &[]).is_err());
    }

    #[test]
    fn a_verdict_may_depend_on_what_an_entry_names() {
        assert!(!Verdict::IfDirectory.leaves_out(FileKind::Directory));
        assert!(Verdict::IfDirectory.leaves_out(FileKind::Symlink));
        assert!(Verdict::LeftOut.leaves_out(FileKind::Directory));
        assert!(!Verdict::Taken.leaves_out(FileKind::Regular));
    }
}
