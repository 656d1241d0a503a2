//! Where a root of the primary stands on the backup: pure decisions about paths.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bfs_common::record::PathBytes;
use bfs_common::wire::Refusal;

/// The names of an absolute path without `.`, `..` or an empty name in it; `None` for any other
/// path and for `/` itself.
#[must_use]
pub fn components(path: &Path) -> Option<Vec<&OsStr>> {
    names(path.as_os_str().as_bytes().strip_prefix(b"/")?)
}

/// The names of a relative path, with the same conditions.
fn names(relative: &[u8]) -> Option<Vec<&OsStr>> {
    relative
        .split(|b| *b == b'/')
        .map(|name| bfs_common::record::Name::new(name).map(|_| OsStr::from_bytes(name)))
        .collect()
}

/// A folder that is given, and the way below it to a root's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootPlace {
    /// `None`: the group's folder in the store; else a folder allowed by `--allow-root`.
    pub base: Option<PathBuf>,
    /// Names below it; never empty.
    pub names: Vec<Vec<u8>>,
}

/// Why a root has no place.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum PlaceError {
    /// Not a plain path.
    #[error("--map {from:?}={to:?}: both must be plain paths without `.` and `..`, FROM absolute")]
    Form {
        /// Left side.
        from: PathBuf,
        /// Right side.
        to: PathBuf,
    },
    /// Outside what is allowed.
    #[error(
        "{0:?} lies outside the store: start the replayer with `--allow-root DIR`, where DIR is a folder \
         above it"
    )]
    NotAllowed(PathBuf),
}

/// The place of a root: by the longest FROM that is a prefix of it, else its own path below the
/// group's folder.
///
/// # Errors
/// [`PlaceError`].
pub fn root_place(
    root: &Path,
    maps: &[(PathBytes, PathBytes)],
    allowed: &[PathBuf],
) -> Result<RootPlace, PlaceError> {
    let map = maps
        .iter()
        .filter(|(from, _)| root.starts_with(from.as_path()))
        .max_by_key(|(from, _)| from.as_path().components().count());
    let Some((from, to)) = map else {
        return below(None, root);
    };
    let (from, to) = (from.as_path(), to.as_path());
    let form = || PlaceError::Form { from: from.into(), to: to.into() };
    let rest = root.strip_prefix(from).map_err(|_| form())?;
    let place = if rest.as_os_str().is_empty() { to.to_path_buf() } else { to.join(rest) };
    if !to.is_absolute() {
        let names = names(place.as_os_str().as_bytes()).ok_or_else(form)?;
        return Ok(RootPlace { base: None, names: names.iter().map(|n| n.as_bytes().to_vec()).collect() });
    }
    components(&place).ok_or_else(form)?;
    let base = allowed
        .iter()
        .filter(|dir| place.starts_with(dir) && place != **dir)
        .max_by_key(|dir| dir.components().count())
        .ok_or_else(|| PlaceError::NotAllowed(place.clone()))?;
    let rest = Path::new("/").join(place.strip_prefix(base).map_err(|_| form())?);
    below(Some(base.clone()), &rest)
}

fn below(base: Option<PathBuf>, absolute: &Path) -> Result<RootPlace, PlaceError> {
    let names = components(absolute)
        .ok_or_else(|| PlaceError::Form { from: absolute.into(), to: absolute.into() })?
        .iter()
        .map(|n| n.as_bytes().to_vec())
        .collect();
    Ok(RootPlace { base, names })
}

/// Whether a group may have this name: it becomes the name of folders.
#[must_use]
pub fn group_name_is_valid(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 100
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// The refusal of any other name.
#[must_use]
pub fn invalid_group_name(name: &str) -> Refusal {
    Refusal::Bad(format!("{name:?} cannot name a group: use letters, digits, `.`, `_` and `-`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(
        root: &str,
        maps: &[(&str, &str)],
        allowed: &[&str],
    ) -> Result<(Option<String>, String), PlaceError> {
        let maps: Vec<_> =
            maps.iter().map(|(f, t)| (PathBytes::new(f.as_ref()), PathBytes::new(t.as_ref()))).collect();
        let allowed: Vec<_> = allowed.iter().map(PathBuf::from).collect();
        let found = root_place(root.as_ref(), &maps, &allowed)?;
        let names: Vec<_> = found.names.iter().map(|n| String::from_utf8_lossy(n).into_owned()).collect();
        Ok((found.base.map(|b| b.display().to_string()), names.join("/")))
    }

    #[test]
    fn roots_stand_at_their_path_or_where_the_map_says() {
        assert_eq!(place("/a/b", &[], &[]), Ok((None, "a/b".into())));
        assert_eq!(place("/a/b", &[("/a", "x")], &[]), Ok((None, "x/b".into())));
        assert_eq!(place("/a/b/c", &[("/a", "x"), ("/a/b", "y/z")], &[]), Ok((None, "y/z/c".into())));
        assert_eq!(place("/ab", &[("/a", "x")], &[]), Ok((None, "ab".into())));
        let far = place("/a/b", &[("/a", "/mnt/disk/x")], &["/mnt", "/mnt/disk"]);
        assert_eq!(far, Ok((Some("/mnt/disk".into()), "x/b".into())));
    }

    #[test]
    fn nothing_leaves_the_store_unasked() {
        for to in ["/etc", "/mnt", "/mntx/y"] {
            assert!(matches!(place("/a", &[("/a", to)], &["/mnt"]), Err(PlaceError::NotAllowed(_))), "{to}");
        }
        for to in ["../x", "x/../../y", "", "/mnt/../etc", "x//y"] {
            assert!(place("/a", &[("/a", to)], &["/mnt"]).is_err(), "{to}");
        }
    }
}
