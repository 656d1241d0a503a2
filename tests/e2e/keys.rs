//! Keys: pairing, what a key may do, revoking and rotating while a program works, and who gets nowhere without one.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use bfs_tests::exercise;
use bfs_tests::programs::Program;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World, binary, said};

fn world(name: &str) -> World {
    let mut world = World::new(name, Transport::Tcp).unwrap();
    world.pairs_itself();
    world.start_replayer().unwrap();
    world
}

/// The program works, and the agent follows it.
fn begin(world: &mut World, program: &dyn Program) {
    program.prepare(&world.place).unwrap();
    let command = program.command(&world.place);
    world.run(&command).unwrap();
}

/// What a command says that has to end with this status.
fn refused(done: &Output, status: i32) -> String {
    let err = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(status), "{}{err}", String::from_utf8_lossy(&done.stdout));
    err
}

/// `bfs-agent WORDS...` with other keys than those of the world.
fn with_keys(keys: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(binary("bfs-agent"));
    command.arg(words[0]).arg("--keys").arg(keys).args(&words[1..]).output().unwrap()
}

/// `bfs-agent run` of something that ends at once.
fn run(world: &World, keys: &Path, group: &str) -> Output {
    let mut command = Command::new(binary("bfs-agent"));
    command.args(["run", "--group", group, "--checkpoint", "manual", "--spool-size", "0"]);
    command.arg("--keys").arg(keys).arg("--path").arg(&world.place.data);
    command.args(["--backup", &world.destination(), "--", "true"]).output().unwrap()
}

/// What a host gets that asks the replayer over TCP what it has of a group.
fn generations(world: &World, keys: &Path, group: &str) -> Output {
    let mut command = Command::new(binary("bfs-replayer"));
    command.args(["generations", "--connect", &world.destination(), "--group", group]);
    command.arg("--keys").arg(keys).output().unwrap()
}

fn fingerprint(keys: &Path) -> String {
    said(&with_keys(keys, &["key"])).unwrap()
}

#[test]
fn a_token_pairs_one_host_and_nothing_else_does() {
    let mut world = world("pairing");
    let (to, keys) = (world.destination(), world.keys());
    let other = world.root().join("other-keys");
    let err = refused(&run(&world, &keys, &world.group), 64);
    assert!(err.contains("is not paired") && err.contains("bfs-replayer pair"), "{err}");

    // Nobody is expected.
    let elsewhere = self::world("pairing-elsewhere");
    let stranger = elsewhere.token(&[]).unwrap();
    let token_of_nobody = {
        // The same replayer's key, but the token of another store.
        let twin = world.root().join("twin");
        fs::create_dir_all(twin.join("keys")).unwrap();
        fs::copy(world.store.join("format"), twin.join("format")).unwrap();
        fs::copy(world.store.join("keys/host.key"), twin.join("keys/host.key")).unwrap();
        let mut command = Command::new(binary("bfs-replayer"));
        said(&command.args(["pair", "--store"]).arg(&twin).output().unwrap()).unwrap()
    };
    let err = refused(&world.of_host(&["pair", &to, &token_of_nobody]).unwrap(), 69);
    assert!(err.contains("nobody is expected"), "{err}");

    let expired = world.token(&["--valid", "500ms"]).unwrap();
    let err = refused(&world.of_host(&["pair", &to, &expired]).unwrap(), 69);
    assert!(err.contains("time of this token is over"), "{err}");
    let token = world.token(&["--name", "first"]).unwrap();
    let err = refused(&world.of_host(&["pair", &to, &token_of_nobody]).unwrap(), 69);
    assert!(err.contains("does not know this token"), "{err}");
    // The token of another replayer: nothing is said to this one.
    let err = refused(&world.of_host(&["pair", &to, &stranger]).unwrap(), 69);
    assert!(err.contains("not the replayer that was meant"), "{err}");
    let last = if token.ends_with('A') { "B" } else { "A" };
    let copied_badly = format!("{}{last}", &token[..token.len() - 1]);
    refused(&world.of_host(&["pair", &to, &copied_badly]).unwrap(), 64);
    assert!(said(&world.of_replayer(&["key", "list"]).unwrap()).unwrap().starts_with("no key"));

    said(&world.of_host(&["pair", &to, &token]).unwrap()).unwrap();
    // Only the answer may have been lost: the same host may say it again, and no other.
    said(&world.of_host(&["pair", &to, &token]).unwrap()).unwrap();
    let err = refused(&with_keys(&other, &["pair", &to, &token]), 69);
    assert!(err.contains("another host has used"), "{err}");
    // It is used for ever.
    world.kill_replayer().unwrap();
    world.start_replayer().unwrap();
    refused(&with_keys(&other, &["pair", &to, &token]), 69);
    let list = said(&world.of_replayer(&["key", "list"]).unwrap()).unwrap();
    assert!(list.contains(&fingerprint(&keys)) && list.contains("first"), "{list}");
    assert!(!list.contains(&fingerprint(&other)), "{list}");
    assert!(run(&world, &keys, &world.group).status.success());
}

#[test]
fn a_key_may_what_it_was_given() {
    let world = world("rights");
    let to = world.destination();
    let [a, b, c] = ["a", "b", "c"].map(|name| world.root().join(name));
    let pair = |keys: &Path, options: &[&str]| {
        let token = world.token(options).unwrap();
        said(&with_keys(keys, &["pair", &to, &token])).unwrap();
    };
    // By hand: each side is told the other's key.
    let replayer = said(&world.of_replayer(&["key"]).unwrap()).unwrap();
    said(&with_keys(&a, &["key", "trust", &to, &replayer])).unwrap();
    let err = refused(&run(&world, &a, "one"), 69);
    assert!(err.contains("does not know this host's key") && err.contains(&fingerprint(&a)), "{err}");
    said(&world.of_replayer(&["key", "allow", &fingerprint(&a), "--name", "by hand"]).unwrap()).unwrap();
    assert!(run(&world, &a, "one").status.success());
    assert!(generations(&world, &a, "one").status.success());

    // What one host wrote is no other's.
    pair(&b, &[]);
    let err = refused(&run(&world, &b, "one"), 69);
    assert!(err.contains("may not write") && err.contains("key allow"), "{err}");
    let err = refused(&generations(&world, &b, "one"), 17);
    assert!(err.contains("may not read"), "{err}");
    assert!(run(&world, &b, "two").status.success());
    // Nor is what was written on the replayer's own host.
    said(&world.of_replayer(&["key", "allow", &fingerprint(&b), "--group", "one", "--may", "read"]).unwrap())
        .unwrap();
    assert!(generations(&world, &b, "one").status.success());
    refused(&run(&world, &b, "one"), 69);

    pair(&c, &["--group", "three", "--may", "write"]);
    assert!(run(&world, &c, "three").status.success());
    refused(&generations(&world, &c, "three"), 17);
    refused(&run(&world, &c, "four"), 69);
    refused(&run(&world, &a, "three"), 69);
    // Each sees the groups with which it has to do.
    let mut command = Command::new(binary("bfs-replayer"));
    let seen = command.args(["status", "--connect", &to, "--keys"]).arg(&c).output().unwrap();
    let seen = said(&seen).unwrap();
    assert!(seen.contains("group three") && !seen.contains("group one"), "{seen}");
}

#[test]
fn a_stolen_key_is_revoked_under_load() {
    let mut world = world("revoke");
    world.pair(&[]).unwrap();
    let program = &AppendWriters;
    begin(&mut world, program);
    world.checkpoint().unwrap();
    // The thief reads with a copy of the key.
    let stolen = world.root().join("stolen");
    fs::create_dir(&stolen).unwrap();
    for name in ["host.key", "peers"] {
        fs::copy(world.keys().join(name), stolen.join(name)).unwrap();
    }
    assert!(generations(&world, &stolen, &world.group).status.success());

    let key = fingerprint(&world.keys());
    let acknowledged = world.status_number(&["durable"]);
    let answer = said(&world.of_replayer(&["key", "revoke", &key]).unwrap()).unwrap();
    assert!(answer.starts_with("revoked; ") && !answer.contains(" 0 connections"), "{answer}");
    // At once: when the command has ended, so have the connections.
    assert_eq!(world.replayer_status().unwrap()["attached"], false);
    let err = refused(&generations(&world, &stolen, &world.group), 17);
    assert!(err.contains("has revoked"), "{err}");
    let why = || world.status().unwrap()["destinations"][0].to_string();
    until("the agent to say why", SOON, || why().contains("has revoked this host's key").then_some(()))
        .unwrap();
    // The program goes on, and what it does is sealed.
    let before = program.activity(&world.place).unwrap();
    until("the program to go on", SOON, || {
        (program.activity(&world.place).unwrap() > before + 500).then_some(())
    })
    .unwrap();
    let sealed = world.checkpoint_until("sealed").unwrap();
    // Nothing that was acknowledged is lost.
    let durable = world.replayer_status().unwrap()["durable"].as_u64().unwrap();
    if let Ok(acknowledged) = acknowledged {
        assert!(durable >= acknowledged, "{durable} < {acknowledged}");
    }
    // Who was revoked gets only what is said now.
    said(&world.of_replayer(&["key", "allow", &key, "--group", "another"]).unwrap()).unwrap();
    until("the agent to say why", SOON, || why().contains("may not write group").then_some(())).unwrap();
    let group = world.group.clone();
    said(&world.of_replayer(&["key", "allow", &key, "--group", &group]).unwrap()).unwrap();
    world.wait_applied(sealed).unwrap();
    exercise::stopped(&world, 0).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn both_keys_are_rotated_while_a_program_works() {
    let mut world = world("rotate");
    world.pair(&[]).unwrap();
    begin(&mut world, &AppendWriters);
    world.checkpoint().unwrap();
    // The primary's: the new one is made known first, then used, then the old one is revoked.
    let old = fingerprint(&world.keys());
    let new = said(&world.of_host(&["key", "rotate"]).unwrap()).unwrap();
    assert_eq!(fingerprint(&world.keys()), old, "it is not used yet");
    said(&world.of_replayer(&["key", "allow", &new, "--as", &old]).unwrap()).unwrap();
    assert_eq!(said(&world.of_host(&["key", "rotate", "--use"]).unwrap()).unwrap(), new);
    exercise::cut(&world, &AppendWriters, 0).unwrap();
    said(&world.of_replayer(&["key", "revoke", &old]).unwrap()).unwrap();
    world.checkpoint().unwrap();
    // The replayer's: each primary trusts the new one first, then it is used, then the old one is forgotten.
    let old = said(&world.of_replayer(&["key"]).unwrap()).unwrap();
    let next = said(&world.of_replayer(&["key", "rotate"]).unwrap()).unwrap();
    let to = world.destination();
    said(&world.of_host(&["key", "trust", &to, &next]).unwrap()).unwrap();
    assert_eq!(said(&world.of_replayer(&["key", "rotate", "--use"]).unwrap()).unwrap(), next);
    exercise::cut(&world, &AppendWriters, 1).unwrap();
    said(&world.of_host(&["key", "forget", &old]).unwrap()).unwrap();
    assert!(generations(&world, &world.keys(), &world.group).status.success(), "a new connection");
    world.kill_replayer().unwrap();
    world.start_replayer().unwrap();
    exercise::stopped(&world, 2).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn another_replayer_at_the_same_address_gets_nothing() {
    let mut world = world("impostor");
    world.pair(&[]).unwrap();
    begin(&mut world, &AppendWriters);
    let applied = world.checkpoint().unwrap();
    world.kill_replayer().unwrap();
    let impostor = world.root().join("impostor");
    let store = std::mem::replace(&mut world.store, impostor);
    world.start_replayer().unwrap();
    let why = || world.status().unwrap()["destinations"][0].to_string();
    until("the agent to say so", SOON, || why().contains("not the replayer that was meant").then_some(()))
        .unwrap();
    let groups = fs::read_dir(world.store.join("log")).unwrap().count();
    assert_eq!(groups, 0, "it got a stream");
    world.kill_replayer().unwrap();
    world.store = store;
    world.start_replayer().unwrap();
    assert!(world.checkpoint().unwrap() > applied);
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// What `openssl s_client` says and gets.
fn s_client(world: &World, options: &[&str]) -> String {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-connect", world.address(), "-ign_eof"]).args(options);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("openssl is there: cargo xtask setup");
    // What it has of the application's bytes is there when it was let in; else the replayer hangs up.
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = err.read_to_string(&mut text);
        text
    });
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    while !String::from_utf8_lossy(&bytes).contains("bfs1") {
        match out.read(&mut piece) {
            Ok(0) | Err(_) => break,
            Ok(len) => bytes.extend_from_slice(&piece[..len]),
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    format!("{}{}", String::from_utf8_lossy(&bytes), errors.join().unwrap())
}

#[test]
fn openssl_sees_tls_1_3_and_gets_in_with_the_key_only() {
    let mut world = world("openssl");
    world.pair(&[]).unwrap();
    let root = world.root().to_owned();
    let make = |words: &[&str]| {
        said(&Command::new("openssl").args(words).current_dir(&root).output().unwrap()).unwrap()
    };
    make(&["genpkey", "-algorithm", "ED25519", "-out", "stranger.key"]);
    // OpenSSL 3.0 does not know the newer form of PKCS#8, which has the public key beside the private one.
    let body: String = fs::read_to_string(world.keys().join("host.key")).unwrap();
    let body: String =
        body.lines().filter(|line| !line.starts_with('-')).map(|line| format!("{line}\n")).collect();
    fs::write(root.join("ours.b64"), body).unwrap();
    make(&["base64", "-d", "-in", "ours.b64", "-out", "ours.der"]);
    let mut old = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20".to_vec();
    old.extend(&fs::read(root.join("ours.der")).unwrap()[16..48]);
    fs::write(root.join("ours.der"), old).unwrap();
    make(&["pkey", "-inform", "DER", "-in", "ours.der", "-out", "ours.key"]);
    for name in ["stranger", "ours"] {
        let (key, certificate) = (format!("{name}.key"), format!("{name}.pem"));
        make(&["req", "-x509", "-new", "-key", &key, "-subj", "/CN=x", "-days", "1", "-out", &certificate]);
    }
    let shown =
        |name: &str| [format!("{}/{name}.pem", root.display()), format!("{}/{name}.key", root.display())];

    let nothing = s_client(&world, &[]);
    assert!(nothing.contains("TLSv1.3") && nothing.contains("ED25519"), "{nothing}");
    assert!(nothing.contains("certificate required") && !nothing.contains("bfs1"), "{nothing}");
    let [certificate, key] = shown("stranger");
    let stranger = s_client(&world, &["-cert", &certificate, "-key", &key]);
    assert!(stranger.contains("certificate unknown") && !stranger.contains("bfs1"), "{stranger}");
    let old = s_client(&world, &["-tls1_2"]);
    assert!(old.contains("protocol version") && !old.contains("bfs1"), "{old}");
    // Another certificate of the same key: nothing counts but the key.
    let [certificate, key] = shown("ours");
    let ours = s_client(&world, &["-cert", &certificate, "-key", &key]);
    assert!(ours.contains("bfs1"), "{ours}");
    // The protocol of pairing is spoken to nobody when no token is out.
    let keys = world.store.join("keys/peers");
    assert!(fs::read_to_string(&keys).unwrap().contains("\"token\""), "that of the pairing is remembered");
    let pairing = s_client(&world, &["-cert", &certificate, "-key", &key, "-alpn", "smtp"]);
    assert!(pairing.contains("no application protocol") && !pairing.contains("bfs1"), "{pairing}");
}

#[test]
fn a_flood_and_a_slow_drip_keep_nobody_out() {
    let mut world = world("flood");
    world.pair(&[]).unwrap();
    begin(&mut world, &AppendWriters);
    world.checkpoint().unwrap();
    let address = world.address().to_owned();
    let ended = std::sync::atomic::AtomicBool::new(false);
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{}/status", world.replayer_pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let before = memory();
    std::thread::scope(|scope| {
        // The beginning of a TLS record that says it is long, and then a byte now and then.
        for drips in [true, false, false] {
            let (address, ended) = (&address, &ended);
            scope.spawn(move || {
                let mut all = Vec::new();
                while !ended.load(std::sync::atomic::Ordering::SeqCst) {
                    if let Ok(mut stream) = TcpStream::connect(address) {
                        let _ = stream.write_all(&[0x16, 3, 1, 0x40, 0, 1, 0, 0x3f]);
                        all.push(stream);
                    }
                    if drips {
                        all.retain_mut(|stream| stream.write_all(&[0]).is_ok());
                    }
                    if all.len() > 300 {
                        all.drain(..150);
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        }
        // Meanwhile the agent goes on, new connections come about, and a new host is paired.
        for index in 0..4 {
            exercise::cut(&world, &AppendWriters, index).unwrap();
            assert!(generations(&world, &world.keys(), &world.group).status.success());
        }
        let token = world.token(&[]).unwrap();
        said(&with_keys(&world.root().join("other"), &["pair", &world.destination(), &token])).unwrap();
        let grown = memory().saturating_sub(before);
        assert!(grown < 128 << 10, "{grown} KiB more");
        ended.store(true, std::sync::atomic::Ordering::SeqCst);
    });
    // Whoever drips is closed after the time for a handshake.
    let mut stream = TcpStream::connect(&address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(&[0x16, 3, 1, 0x40, 0]).unwrap();
    assert!(matches!(stream.read(&mut [0; 64]), Ok(0) | Err(_)));
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn a_key_file_that_others_can_have_a_hand_in_is_refused() {
    let mut world = world("key-files");
    world.pair(&[]).unwrap();
    assert!(run(&world, &world.keys(), &world.group).status.success());
    world.kill_replayer().unwrap();
    let serve = || {
        let mut command = Command::new(binary("bfs-replayer"));
        command.args(["serve", "--listen", "tcp://127.0.0.1:0", "--store"]).arg(&world.store);
        command.output().unwrap()
    };
    for (file, is_replayer) in
        [(world.store.join("keys/host.key"), true), (world.keys().join("host.key"), false)]
    {
        let fails = |what: &str| {
            let err = if is_replayer {
                refused(&serve(), 15)
            } else {
                refused(&with_keys(&world.keys(), &["key"]), 64)
            };
            assert!(err.contains(&file.display().to_string()) && err.contains(what), "{err}");
        };
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        fails("has mode 0644");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(&file, Some(12345), None).unwrap();
        fails("belongs to user 12345");
        std::os::unix::fs::chown(&file, Some(0), None).unwrap();
        let aside = file.with_extension("aside");
        fs::rename(&file, &aside).unwrap();
        symlink(&aside, &file).unwrap();
        fails("is not a regular file");
        fs::remove_file(&file).unwrap();
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        fails("holds no key");
        fs::rename(&aside, &file).unwrap();
    }
    let peers = world.store.join("keys/peers");
    let text = fs::read_to_string(&peers).unwrap();
    fs::write(&peers, text.replace("false", "true ")).unwrap();
    let err = refused(&serve(), 15);
    assert!(err.contains("is damaged"), "{err}");
}
