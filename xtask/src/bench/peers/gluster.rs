//! A glusterfs volume with two bricks, in a network namespace of its own: the program writes below a FUSE mount, and each
//! call returns when both bricks have it. One brick is on the program's disk, the other where a copy would be.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{World, command_ok};

use super::super::leftovers;
use super::{Begun, Daemon, Peer, daemon};
use crate::setup::Tool;

/// Of the one host that there is in the namespace; no loopback address is taken.
const ADDRESS: &str = "10.77.0.1";
const ANSWERS_WITHIN: Duration = Duration::from_secs(60);

/// See the module.
pub struct Gluster;

/// The namespace, gone when dropped; what works in it ends with the world.
struct Namespace(String);

impl Namespace {
    fn new() -> Result<Self> {
        let namespace = Self(leftovers::name());
        command_ok(Command::new("ip").args(["netns", "add", &namespace.0]))?;
        for words in [
            &["link", "set", "lo", "up"][..],
            &["link", "add", "bench", "type", "veth", "peer", "name", "other"],
            &["addr", "add", &format!("{ADDRESS}/24"), "dev", "bench"],
            &["link", "set", "bench", "up"],
            &["link", "set", "other", "up"],
        ] {
            command_ok(Command::new("ip").args(["-n", &namespace.0]).args(words))?;
        }
        Ok(namespace)
    }

    /// Words that begin a command in it; mounts are those of everybody.
    fn enter(&self) -> String {
        format!("nsenter --net=/run/netns/{}", self.0)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        leftovers::remove_namespace(&self.0);
    }
}

impl Peer for Gluster {
    fn name(&self) -> &'static str {
        "glusterfs, 2 bricks"
    }

    fn kind(&self) -> &'static str {
        "a file system of its own, each call to both"
    }

    fn tools(&self) -> &'static [Tool] {
        &[
            ("glusterd", "glusterfs-server", "a peer in `bench peers`"),
            ("glusterfs", "glusterfs-client", "the same"),
            ("ip", "iproute2", "network namespaces"),
        ]
    }

    fn begin(&self, world: &mut World, cpu: Option<usize>) -> Result<Begun> {
        let namespace = Namespace::new()?;
        let work = world.root().join("glusterd");
        let bricks = [world.root().join("brick"), world.store.join("brick")];
        let at = world.root().join("volume");
        for folder in [&work, &work.join("run"), &bricks[0], &bricks[1], &at] {
            fs::create_dir_all(folder)?;
        }
        let socket = work.join("socket");
        fs::write(work.join("glusterd.vol"), configuration(&work, &socket))?;
        let script = format!(
            "exec {} glusterd -N -f '{work}/glusterd.vol' -p '{work}/pid' -l '{work}/log'",
            namespace.enter(),
            work = work.display()
        );
        let server = daemon(world, cpu, &script)?;
        let gluster = |words: &str| -> Result<()> {
            let script = format!(
                "{} gluster --mode=script --log-file='{}/cli' --glusterd-sock='{}' {words}",
                namespace.enter(),
                work.display(),
                socket.display()
            );
            shell(world, &script).with_context(|| format!("gluster {words}"))
        };
        until("glusterd", ANSWERS_WITHIN, || gluster("volume list").is_ok().then_some(()))?;
        let of = |brick: &PathBuf| format!("{ADDRESS}:{}", brick.display());
        gluster(&format!("volume create v replica 2 {} {} force", of(&bricks[0]), of(&bricks[1])))?;
        gluster("volume start v")?;
        let pinned = cpu.map_or(String::new(), |cpu| format!("taskset -c {cpu} "));
        shell(
            world,
            &format!(
                "{} {pinned}glusterfs -l '{}/mount' --volfile-server={ADDRESS} --volfile-id=v '{}'",
                namespace.enter(),
                work.display(),
                at.display()
            ),
        )?;
        world.place.data = at.join("data");
        until("the volume", SOON, || fs::create_dir(&world.place.data).is_ok().then_some(()))?;
        // The other brick, too, before anything is measured.
        let copy = bricks[1].join("data");
        until("the second brick", SOON, || copy.exists().then_some(()))?;
        let guard: (Daemon, Namespace) = (server, namespace);
        Ok(Begun { before: Vec::new(), copy: Some(copy), guard: Box::new(guard) })
    }
}

/// Runs to its end; what it starts ends with the world.
fn shell(world: &World, script: &str) -> Result<()> {
    let status = world.spawn_shell(script)?.wait()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

fn configuration(work: &Path, socket: &Path) -> String {
    let (work, socket) = (work.display(), socket.display());
    format!(
        "volume management
    type mgmt/glusterd
    option working-directory {work}
    option run-directory {work}/run
    option glusterd-sockfile {socket}
    option transport-type socket
    option transport.socket.listen-port 24007
    option transport.address-family inet
end-volume
"
    )
}
