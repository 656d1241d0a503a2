//! Inode numbers of a mount, and the directories above the roots. Pure.
//!
//! The directory that is mounted is 1; an object is its number and 1; the other directories above roots
//! count downwards from the highest number there is.

use std::collections::BTreeMap;

use bfs_common::record::{Name, ObjectId, PathBytes};

/// Inode number of the directory that is mounted.
pub const TOP: u64 = 1;

/// What an inode number stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ino {
    /// A directory above a root.
    Above(usize),
    /// An object of the checkpoint.
    Object(ObjectId),
}

/// The directories above the roots.
#[derive(Debug)]
pub struct Names {
    /// The first is the directory that is mounted.
    above: Vec<BTreeMap<Name, Ino>>,
}

impl Names {
    /// Each root stands at its absolute path of the primary.
    #[must_use]
    pub fn new(roots: &[(PathBytes, ObjectId)]) -> Self {
        let mut above = vec![BTreeMap::new()];
        for (path, object) in roots {
            let mut names = path.0.split(|byte| *byte == b'/').filter_map(Name::new).peekable();
            let mut at = 0;
            while let Some(name) = names.next() {
                if names.peek().is_none() {
                    above[at].insert(name, Ino::Object(*object));
                    break;
                }
                let free = above.len();
                match *above[at].entry(name).or_insert(Ino::Above(free)) {
                    Ino::Above(next) => at = next,
                    // Below another root: it is there already.
                    Ino::Object(_) => break,
                }
                if at == free {
                    above.push(BTreeMap::new());
                }
            }
        }
        Self { above }
    }

    /// What a number stands for.
    #[must_use]
    pub fn of(&self, number: u64) -> Option<Ino> {
        if number == TOP {
            return Some(Ino::Above(0));
        }
        let from_top = usize::try_from(u64::MAX - number).ok()?.checked_add(1)?;
        if from_top < self.above.len() {
            return Some(Ino::Above(from_top));
        }
        (number > TOP).then(|| Ino::Object(ObjectId(number - 1)))
    }

    /// What is in a directory above the roots.
    #[must_use]
    pub fn entries(&self, directory: usize) -> &BTreeMap<Name, Ino> {
        &self.above[directory]
    }
}

impl Ino {
    /// Its number.
    #[must_use]
    pub fn number(self) -> u64 {
        match self {
            Self::Above(0) => TOP,
            Self::Above(n) => u64::MAX - (n as u64 - 1),
            Self::Object(object) => object.0 + 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> PathBytes {
        PathBytes::new(text.as_ref())
    }

    #[test]
    fn roots_stand_at_their_paths() {
        let roots = [
            (path("/srv/a"), ObjectId(1)),
            (path("/srv/b/c"), ObjectId(7)),
            (path("/srv/a/inside"), ObjectId(9)),
            (path("/top"), ObjectId(3)),
        ];
        let names = Names::new(&roots);
        let entry =
            |at: usize, name: &str| names.entries(at).get(&Name::new(name.as_bytes()).unwrap()).copied();
        assert_eq!(entry(0, "top"), Some(Ino::Object(ObjectId(3))));
        let Some(Ino::Above(srv)) = entry(0, "srv") else { panic!() };
        assert_eq!(entry(srv, "a"), Some(Ino::Object(ObjectId(1))));
        let Some(Ino::Above(b)) = entry(srv, "b") else { panic!() };
        assert_eq!(entry(b, "c"), Some(Ino::Object(ObjectId(7))));
        for ino in [Ino::Above(0), Ino::Above(srv), Ino::Above(b), Ino::Object(ObjectId(1))] {
            assert_eq!(names.of(ino.number()), Some(ino));
        }
        assert_eq!(Ino::Above(0).number(), TOP);
        assert_eq!(names.of(0), None);
    }
}
