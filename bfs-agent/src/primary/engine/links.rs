//! The names of an object. Nearly all have one; some have 65,000.

use std::collections::BTreeSet;

use bfs_common::record::{Name, ObjectId};
use smallvec::SmallVec;

/// A directory and a name in it.
pub type Link = (ObjectId, Name);

/// From how many on they are kept in order.
const MANY: usize = 32;

/// The entries that name an object. Each stands in here once.
#[derive(Clone, Debug)]
pub enum Links {
    /// A list that is searched.
    Few(SmallVec<[Link; 1]>),
    /// A tree.
    Many(BTreeSet<Link>),
}

impl Default for Links {
    fn default() -> Self {
        Self::Few(SmallVec::new())
    }
}

impl Links {
    /// Adds one that is not in here.
    pub fn add(&mut self, directory: ObjectId, name: Name) {
        match self {
            Self::Few(list) if list.len() < MANY => list.push((directory, name)),
            Self::Few(list) => {
                let mut tree: BTreeSet<Link> = list.drain(..).collect();
                tree.insert((directory, name));
                *self = Self::Many(tree);
            }
            Self::Many(tree) => {
                tree.insert((directory, name));
            }
        }
    }

    /// Takes one out.
    pub fn remove(&mut self, directory: ObjectId, name: &Name) {
        match self {
            Self::Few(list) => list.retain(|l| l.0 != directory || l.1 != *name),
            Self::Many(tree) => {
                tree.remove(&(directory, name.clone()));
            }
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Few(list) => list.len(),
            Self::Many(tree) => tree.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One of them.
    #[must_use]
    pub fn first(&self) -> Option<&Link> {
        match self {
            Self::Few(list) => list.first(),
            Self::Many(tree) => tree.first(),
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Link> {
        let (list, tree) = match self {
            Self::Few(list) => (Some(list), None),
            Self::Many(tree) => (None, Some(tree)),
        };
        list.into_iter().flatten().chain(tree.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_become_many_and_none() {
        let mut links = Links::default();
        let name = |i: usize| Name::new(i.to_string().as_bytes()).expect("a name");
        for i in 0..100 {
            links.add(ObjectId(i as u64 % 3), name(i));
            assert_eq!((links.len(), links.iter().count()), (i + 1, i + 1));
        }
        for i in 0..100 {
            assert!(links.first().is_some());
            links.remove(ObjectId(i as u64 % 3), &name(i));
        }
        assert!(links.is_empty() && links.first().is_none());
    }
}
