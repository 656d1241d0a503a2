//! Peers that watch the directory (inotify) and copy what changed afterwards.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{World, command_ok};

use super::{Begun, Daemon, Peer, daemon};
use crate::setup::Tool;

const KIND: &str = "watches, copies afterwards";
const RSYNC: Tool = ("rsync", "rsync", "copies for peers in `bench peers`");
/// Lies there when the peer begins; it works when its copy is there.
const MARK: &str = "begun";

/// The folder of the copy.
fn copy_folder(world: &World) -> Result<PathBuf> {
    let copy = world.store.join("copy");
    fs::create_dir_all(&copy)?;
    fs::write(world.place.data.join(MARK), "")?;
    Ok(copy)
}

fn begun(copy: PathBuf, guard: Vec<Daemon>) -> Result<Begun> {
    until("the peer's first copy", SOON, || copy.join(MARK).exists().then_some(()))?;
    Ok(Begun { before: Vec::new(), copy: Some(copy), guard: Box::new(guard) })
}

/// lsyncd, which collects for a second and calls rsync.
pub struct Lsyncd;

impl Peer for Lsyncd {
    fn name(&self) -> &'static str {
        "lsyncd"
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn tools(&self) -> &'static [Tool] {
        &[("lsyncd", "lsyncd", "a peer in `bench peers`"), RSYNC]
    }

    fn begin(&self, world: &mut World, cpu: Option<usize>) -> Result<Begun> {
        let copy = copy_folder(world)?;
        let script = format!("exec lsyncd -nodaemon -delay 1 -rsync \"$1\" '{}'", copy.display());
        let daemon = daemon(world, cpu, &script)?;
        begun(copy, vec![daemon])
    }
}

/// The loop that people write themselves.
pub struct RsyncLoop;

impl Peer for RsyncLoop {
    fn name(&self) -> &'static str {
        "inotifywait + rsync"
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn tools(&self) -> &'static [Tool] {
        &[("inotifywait", "inotify-tools", "a peer in `bench peers`"), RSYNC]
    }

    fn begin(&self, world: &mut World, cpu: Option<usize>) -> Result<Begun> {
        let copy = copy_folder(world)?;
        // What changes while rsync works is seen with the next change, or after five seconds.
        let script = format!(
            "while :; do rsync -a --delete \"$1/\" '{}/' || :
            inotifywait -qq -r -t 5 -e modify,create,delete,move,attrib \"$1\" || :; done",
            copy.display()
        );
        let daemon = daemon(world, cpu, &script)?;
        begun(copy, vec![daemon])
    }
}

/// Two instances of Syncthing that know only each other.
pub struct Syncthing;

impl Peer for Syncthing {
    fn name(&self) -> &'static str {
        "Syncthing"
    }

    fn kind(&self) -> &'static str {
        KIND
    }

    fn tools(&self) -> &'static [Tool] {
        &[("syncthing", "syncthing", "a peer in `bench peers`")]
    }

    fn begin(&self, world: &mut World, cpu: Option<usize>) -> Result<Begun> {
        let copy = copy_folder(world)?;
        let folders = [world.place.data.clone(), copy.clone()];
        let homes = ["syncthing-a", "syncthing-b"].map(|name| world.root().join(name));
        // Ports that are free now: two of each.
        let listeners = [TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?];
        let mut addresses = Vec::new();
        for listener in &listeners {
            addresses.push(listener.local_addr()?.to_string());
        }
        drop(listeners);
        let mut ids = Vec::new();
        for home in &homes {
            fs::create_dir(home)?;
            let mut generate = Command::new("syncthing");
            command_ok(generate.env("HOME", home).arg("generate").arg(format!("--home={}", home.display())))?;
            let mut id = Command::new("syncthing");
            id.env("HOME", home).arg("--device-id").arg(format!("--home={}", home.display()));
            ids.push(String::from_utf8_lossy(&command_ok(&mut id)?.stdout).trim().to_owned());
        }
        let mut guard = Vec::new();
        for (at, home) in homes.iter().enumerate() {
            // What says that a folder is really there.
            fs::create_dir(folders[at].join(".stfolder"))?;
            fs::write(home.join("config.xml"), configuration(&folders[at], &ids, &addresses, at))?;
            let script = format!(
                "HOME='{0}' exec syncthing serve --no-browser --no-upgrade --home='{0}'",
                home.display()
            );
            guard.push(daemon(world, cpu, &script)?);
        }
        begun(copy, guard)
    }
}

/// A configuration without anybody else: no discovery, no relays, no reports, no web interface.
fn configuration(folder: &Path, ids: &[String], addresses: &[String], own: usize) -> String {
    let folder = folder.display();
    let (mut members, mut devices) = (String::new(), String::new());
    for (id, address) in ids.iter().zip(addresses) {
        members += &format!("<device id=\"{id}\"/>");
        devices += &format!(
            "<device id=\"{id}\" name=\"{id}\" compression=\"metadata\"><address>tcp://{address}</address></device>"
        );
    }
    let kind = if own == 0 { "sendonly" } else { "receiveonly" };
    format!(
        "<configuration version=\"36\">
        <folder id=\"bench\" path=\"{folder}\" type=\"{kind}\" rescanIntervalS=\"3600\" fsWatcherEnabled=\"true\"
            fsWatcherDelayS=\"1\">{members}<filesystemType>basic</filesystemType></folder>
        {devices}<gui enabled=\"false\"/>
        <options><listenAddress>tcp://{own}</listenAddress><globalAnnounceEnabled>false</globalAnnounceEnabled>
            <localAnnounceEnabled>false</localAnnounceEnabled><relaysEnabled>false</relaysEnabled>
            <natEnabled>false</natEnabled><urAccepted>-1</urAccepted><crashReportingEnabled>false</crashReportingEnabled>
            <startBrowser>false</startBrowser><reconnectionIntervalS>1</reconnectionIntervalS></options>
        </configuration>\n",
        own = addresses[own]
    )
}
