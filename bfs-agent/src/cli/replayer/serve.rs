//! `serve`: a store and its sockets, until a signal ends it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::alert::{LOOK_EVERY, Teller};
use crate::backup::watching::{Condition, what_is_wrong};
use crate::backup::{Replayer, ReplayerHandle, ServeOptions};
use crate::generation::wall_ns;
use crate::net::{Destination, Scrape};
use crate::primary::schedule::parse_time;
use crate::service::Service;

/// By what others learn how a replayer stands.
#[derive(Debug, Args)]
pub(super) struct Watching {
    /// Run by the shell when something goes wrong with a group, and when that is over. BFS_GROUP says which, BFS_ALERT
    /// what: away (the agent is gone and did not say that it ends), full, stuck or damaged; BFS_STATE begins or ends;
    /// BFS_MESSAGE more
    #[arg(long, value_name = "CMD")]
    alert: Option<String>,
    /// How long an agent may be gone, before that is an alert
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_time)]
    alert_after: Duration,
    /// Show numbers for Prometheus at /metrics there: tcp://127.0.0.1:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    metrics: Option<Destination>,
}

/// Serves until SIGTERM or SIGINT.
pub(super) fn serve(options: ServeOptions, watching: &Watching) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Before the store is opened: a signal during a long start ends it cleanly too.
    let mut signals = {
        let _inside = runtime.enter();
        [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?]
    };
    let handle = Arc::new(Replayer::start(options)?);
    for address in handle.listening() {
        eprintln!("listening on {address}");
    }
    let asked = Arc::clone(&handle);
    let shown = move || Some(crate::backup::metrics::metrics(&asked.status(), &asked.following()));
    let scrape = watching.metrics.as_ref().map(|at| Scrape::start(at, shown)).transpose()?;
    if let Some(scrape) = &scrape {
        eprintln!("metrics on {}", scrape.at());
    }
    let mut service = Service::of_environment();
    service.ready("serving");
    let [terminate, interrupt] = &mut signals;
    runtime.block_on(async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = watched(&handle, &mut service) => {}
            () = told(&handle, watching) => {}
        }
    });
    service.stopping();
    drop(scrape);
    drop(handle);
    Ok(())
}

/// Tells the service manager that the replayer answers, for as long as it does.
async fn watched(handle: &ReplayerHandle, service: &mut Service) {
    loop {
        match service.every() {
            None => std::future::pending::<()>().await,
            Some(every) => tokio::time::sleep(every).await,
        }
        handle.answers().await;
        service.alive();
    }
}

/// Tells whoever the user named what goes wrong, for ever.
async fn told(handle: &ReplayerHandle, watching: &Watching) {
    let Some(command) = &watching.alert else { return std::future::pending().await };
    let mut tellers = BTreeMap::<String, Teller<Condition>>::new();
    loop {
        for group in handle.status() {
            let teller = tellers.entry(group.group.clone()).or_default();
            let wrong = what_is_wrong(&group, watching.alert_after, wall_ns());
            if let Some(trouble) = teller.tell(command, &group.group, &wrong, None) {
                tracing::warn!("group {}: {trouble}", group.group);
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
