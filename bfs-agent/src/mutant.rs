//! Ways in which the code can be wrong on purpose, in the unit tests only: there each must be caught.

/// A rule that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// The log says that a batch is durable without a sync.
    AcknowledgesBeforeSync,
    /// A segment is written over before its old name is gone for good.
    RenewsBeforeSync,
    /// A step that goes on takes its before-images once more.
    RetakesImages,
    /// A marker passes the gate while a gap is open.
    ConfirmsOverGap,
    /// The index says that a step is done before the tree is synced.
    MovesPositionBeforeSync,
    /// A step that goes on takes what stands under a name for what stood there before.
    RedoesByName,
    /// Who was primary before another was promoted may write on.
    AdmitsFenced,
    /// A promotion that was said to have failed counts as one that never was.
    ForgetsDoubt,
    /// Further destinations get checkpoints that the first one may never have.
    SendsUnsealed,
}

#[cfg(test)]
thread_local! {
    static ACTIVE: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// From now on this thread's code is wrong in this way.
#[cfg(test)]
pub fn set(mutant: Option<Mutant>) {
    ACTIVE.set(mutant);
}

/// Whether the code is to be wrong in this way.
#[cfg(test)]
pub fn is(mutant: Mutant) -> bool {
    ACTIVE.get() == Some(mutant)
}

/// Never: nothing of it is compiled.
#[cfg(not(test))]
#[must_use]
pub const fn is(_: Mutant) -> bool {
    false
}
