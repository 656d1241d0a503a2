//! How the backup stands to this host, since when, and why. Which of the states it is, and when one began, is decided here;
//! what is done about it (`--alert`, the status, a monitor) is elsewhere.

use std::time::{Duration, Instant};

use super::work::Work;
use crate::generation::wall_ns;
use crate::primary::control::Standing;
use bfs_common::wire::Refusal;

/// Between two looks, unless somebody asks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What is known of the way to the backup at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct View {
    /// Another host is the primary: why, and whether this one has made something since.
    fenced: Option<(String, bool)>,
    /// The replayer takes nothing more, because of this.
    refused: Option<String>,
    /// There is no connection, because of this.
    away: Option<String>,
    /// Nothing was confirmed for longer than it may take, because of this.
    late: Option<String>,
}

impl View {
    /// The gravest of what is wrong.
    fn standing(self) -> (Standing, Option<String>) {
        match self {
            Self { fenced: Some((why, true)), .. } | Self { refused: Some(why), .. } => {
                (Standing::Diverged, Some(why))
            }
            Self { fenced: Some((why, false)), .. } => (Standing::Fenced, Some(why)),
            Self { away: Some(why), .. } => (Standing::Detached, Some(why)),
            Self { late: Some(why), .. } => (Standing::Lagging, Some(why)),
            _ => (Standing::Attached, None),
        }
    }
}

/// The state, and since when it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Watch {
    /// It.
    pub standing: Standing,
    /// Since when, nanoseconds since 1970.
    pub since_ns: i64,
    /// Why.
    pub why: Option<String>,
}

impl Watch {
    /// A session begins with a connection.
    pub(super) fn new(now_ns: i64) -> Self {
        Self { standing: Standing::Attached, since_ns: now_ns, why: None }
    }

    /// For how long it stands so, nanoseconds.
    pub(super) fn lasts_ns(&self, now_ns: i64) -> i64 {
        now_ns.saturating_sub(self.since_ns)
    }

    /// Another reason of the same state is no change of it.
    fn look(&mut self, view: View, now_ns: i64) {
        let (standing, why) = view.standing();
        if standing != self.standing {
            self.since_ns = now_ns;
        }
        (self.standing, self.why) = (standing, why);
    }
}

impl Work {
    /// Looks how the backup stands, now and then.
    pub(super) fn tend_watch(&mut self) {
        if self.watched.is_none_or(|watched| watched.elapsed() >= LOOK_EVERY) {
            self.look_at_backup();
        }
    }

    /// Looks how the backup stands.
    pub(super) fn look_at_backup(&mut self) {
        self.watched = Some(Instant::now());
        let progress = self.link.progress();
        let mut view = View::default();
        match &progress.refusal {
            Some(why @ Refusal::Promoted { .. }) => {
                let diverged = self.fenced(&progress).is_some_and(|fenced| fenced.diverged);
                view.fenced = Some((why.to_string(), diverged));
            }
            Some(why) => view.refused = Some(why.to_string()),
            None => {}
        }
        if !progress.connected {
            view.away = Some(progress.last_error.clone().unwrap_or_else(|| "no connection".into()));
        }
        let lag = self.lag(&progress);
        if lag > self.options.alerts.unconfirmed_after {
            let why = self.why_not_confirmed(&progress).unwrap_or_default();
            view.late = Some(format!("nothing was confirmed for {} s: {why}", lag.as_secs()));
        }
        self.watch.look(view, wall_ns());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gravest_counts_and_since_when_is_that_of_the_state() {
        let mut watch = Watch::new(1);
        let away = |why: &str| View { away: Some(why.into()), ..View::default() };
        watch.look(View::default(), 2);
        assert_eq!(watch, Watch { standing: Standing::Attached, since_ns: 1, why: None });
        watch.look(View { late: Some("slow".into()), ..away("gone") }, 3);
        assert_eq!(
            (watch.standing, watch.since_ns, watch.why.as_deref()),
            (Standing::Detached, 3, Some("gone"))
        );
        watch.look(away("still gone"), 4);
        assert_eq!((watch.since_ns, watch.why.as_deref()), (3, Some("still gone")));
        watch.look(View { late: Some("slow".into()), ..View::default() }, 5);
        assert_eq!((watch.standing, watch.since_ns), (Standing::Lagging, 5));
        watch.look(View { fenced: Some(("promoted".into(), false)), ..away("gone") }, 6);
        assert_eq!((watch.standing, watch.since_ns), (Standing::Fenced, 6));
        watch.look(View { fenced: Some(("promoted".into(), true)), ..away("gone") }, 7);
        assert_eq!((watch.standing, watch.since_ns), (Standing::Diverged, 7));
        watch.look(View { refused: Some("a fork".into()), ..View::default() }, 8);
        assert_eq!((watch.since_ns, watch.why.as_deref()), (7, Some("a fork")));
    }
}
