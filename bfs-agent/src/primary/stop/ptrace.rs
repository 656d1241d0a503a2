//! Stopping by ptrace: `PTRACE_SEIZE` and `PTRACE_INTERRUPT` of every thread, for `attach --pid`.
//!
//! ptrace belongs to the thread that traces, so each stop has a thread of its own, which ends
//! when the processes are let go. Should the agent die, the kernel detaches all of them and they
//! run on (no `PTRACE_O_EXITKILL`), and a signal that was about to be delivered still is.
//!
//! Threads and children can be born while the others are being stopped, so the lists are read
//! again until a pass finds nobody new after everybody known stands. A parent in `vfork` cannot
//! be interrupted while its child stands (it sleeps killable in `wait_for_vfork_done`,
//! kernel/fork.c); it cannot do anything either, and counts as standing.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Limits, StopError, Stopped, Stopper};

/// Says which processes (thread group ids) are selected right now. Nobody may be missing: whoever is not named
/// runs on, and changes what is being read.
pub type Members = Box<dyn FnMut() -> io::Result<Vec<u32>> + Send>;

/// `PTRACE_EVENT_STOP` (include/uapi/linux/ptrace.h): the stop that PTRACE_INTERRUPT makes, and
/// group stops.
const EVENT_STOP: i32 = 128;

/// Between two looks at the threads that do not stand yet.
const LOOK_MIN: Duration = Duration::from_micros(50);
const LOOK_MAX: Duration = Duration::from_millis(1);

/// Stops processes by ptrace.
pub struct Ptrace {
    members: Option<Members>,
    running: Option<Running>,
}

struct Running {
    since: Instant,
    limits: Limits,
    /// Dropping it lets them go.
    go: SyncSender<()>,
    /// Gives the members back, and whether they stood until `go`.
    thread: JoinHandle<(Members, bool)>,
}

impl std::fmt::Debug for Ptrace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ptrace").field("stopped", &self.running.is_some()).finish_non_exhaustive()
    }
}

impl Ptrace {
    /// Stops whatever `members` names at the time of the stop.
    #[must_use]
    pub fn new(members: Members) -> Self {
        Self { members: Some(members), running: None }
    }
}

impl Stopper for Ptrace {
    fn stop(&mut self, limits: Limits) -> Result<Stopped, StopError> {
        let Some(mut members) = self.members.take() else { return Err(StopError::Already) };
        let since = Instant::now();
        let (go, goes) = mpsc::sync_channel::<()>(0);
        let (stands, stood) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("bfs-ptrace".into())
            .spawn(move || {
                let mut tracees = Tracees::default();
                let reached = tracees.stop(&mut members, since, limits.reach);
                let ok = reached.is_ok();
                let _ = stands.send(reached);
                let in_time = ok && wait_for_go(&goes, since + limits.stand);
                tracees.let_go();
                (members, in_time)
            })
            .map_err(|e| StopError::system("clone", "the tracing thread", e))?;
        // The thread always answers within `reach`, or died.
        let reached = stood.recv().unwrap_or_else(|_| {
            Err(StopError::system("ptrace", "the tracing thread", io::Error::other("it ended")))
        });
        match reached {
            Ok(threads) => {
                self.running = Some(Running { since, limits, go, thread });
                Ok(Stopped { reached_in: since.elapsed(), threads })
            }
            Err(error) => {
                drop(go);
                self.members = thread.join().ok().map(|(members, _)| members);
                Err(error)
            }
        }
    }

    fn standing(&mut self) -> bool {
        self.running.as_ref().is_some_and(|r| !r.thread.is_finished() && r.since.elapsed() < r.limits.stand)
    }

    fn go(&mut self) -> Result<Duration, StopError> {
        let Some(Running { since, limits, go, thread }) = self.running.take() else {
            return Ok(Duration::ZERO);
        };
        drop(go);
        let let_go = || StopError::LetGo { limit_ms: limits.stand.as_millis() };
        let (members, in_time) = thread.join().map_err(|_| let_go())?;
        self.members = Some(members);
        if in_time { Ok(since.elapsed()) } else { Err(let_go()) }
    }
}

impl Drop for Ptrace {
    fn drop(&mut self) {
        let _ = self.go();
    }
}

/// Waits for the word to go, until the deadline; false when that passed.
fn wait_for_go(goes: &Receiver<()>, deadline: Instant) -> bool {
    match goes.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(()) | Err(RecvTimeoutError::Disconnected) => true,
        Err(RecvTimeoutError::Timeout) => false,
    }
}

/// How a thread stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Seized and interrupted, not seen to stand yet.
    Waiting,
    /// In a ptrace stop; the signal is delivered when it is let go.
    Stands { signal: i32 },
    /// It ended.
    Gone,
}

#[derive(Default)]
struct Tracees {
    threads: BTreeMap<i32, State>,
}

impl Tracees {
    fn stop(&mut self, members: &mut Members, since: Instant, limit: Duration) -> Result<usize, StopError> {
        let mut pause = LOOK_MIN;
        loop {
            let processes =
                members().map_err(|e| StopError::system("bpf", "the list of the processes", e))?;
            let new = self.seize_new(processes)?;
            self.collect()?;
            let standing = self.all_stand();
            if standing && !new {
                return Ok(self.threads.values().filter(|s| **s != State::Gone).count());
            }
            if since.elapsed() >= limit {
                return Err(StopError::Late { limit_ms: limit.as_millis(), waiting: self.missing() });
            }
            if !standing {
                // The kernel has no wait with a deadline for ptrace stops that would not take
                // SIGCHLD from the rest of this process, so the condition is looked at again.
                std::thread::sleep(pause);
                pause = (pause * 2).min(LOOK_MAX);
            }
        }
    }

    /// Seizes the threads that are not known yet; whether there was one.
    fn seize_new(&mut self, processes: Vec<u32>) -> Result<bool, StopError> {
        let mut any = false;
        for process in processes {
            // A process that is gone has no task directory: nothing to stop.
            let Ok(tasks) = fs::read_dir(format!("/proc/{process}/task")) else { continue };
            for task in tasks.flatten() {
                let Some(tid) = task.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
                    continue;
                };
                if matches!(self.threads.get(&tid), Some(State::Waiting | State::Stands { .. })) {
                    continue;
                }
                if self.threads.get(&tid) == Some(&State::Gone) && !alive(tid) {
                    continue;
                }
                match self.seize(tid)? {
                    Some(state) => {
                        any |= state == State::Waiting;
                        self.threads.insert(tid, state);
                    }
                    None => any = true,
                }
            }
        }
        Ok(any)
    }

    /// `None` when it is to be tried again: the tracer of the stop before may not be quite gone.
    fn seize(&self, tid: i32) -> Result<Option<State>, StopError> {
        for request in [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT] {
            if ptrace(request, tid, 0) != 0 {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::ESRCH | libc::EPERM) if !alive(tid) => return Ok(Some(State::Gone)),
                    Some(libc::EPERM) if !traced(tid) || own_tracer(tid) => return Ok(None),
                    _ => {
                        let call =
                            if request == libc::PTRACE_SEIZE { "PTRACE_SEIZE" } else { "PTRACE_INTERRUPT" };
                        return Err(StopError::system(call, format!("thread {tid}"), error));
                    }
                }
            }
        }
        Ok(Some(State::Waiting))
    }

    /// Takes what the threads report.
    fn collect(&mut self) -> Result<(), StopError> {
        for (&tid, state) in &mut self.threads {
            if *state != State::Waiting {
                continue;
            }
            let mut status = 0;
            // SAFETY: status is a valid place for an int for the time of the call.
            let got = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
            if got == tid && libc::WIFSTOPPED(status) {
                let signal = if status >> 16 == EVENT_STOP { 0 } else { libc::WSTOPSIG(status) };
                *state = State::Stands { signal };
            } else if got == tid || (got < 0 && !alive(tid)) {
                *state = State::Gone;
            } else if got < 0 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::EINTR) {
                    return Err(StopError::system("waitpid", format!("thread {tid}"), error));
                }
            }
        }
        Ok(())
    }

    fn all_stand(&self) -> bool {
        self.threads.iter().all(|(tid, s)| *s != State::Waiting || stuck_in_vfork(*tid) || is_zombie(*tid))
    }

    fn missing(&self) -> String {
        let missing = self.threads.iter().filter(|(_, s)| **s == State::Waiting).take(4);
        let names: Vec<_> = missing.map(|(t, _)| format!("thread {t} in state {}", state_of(*t))).collect();
        if names.is_empty() { "new threads keep appearing".into() } else { names.join(", ") }
    }

    /// Detaches those that stand. The others (a vfork parent) are let go by the end of this
    /// thread, which also takes back the interrupt (kernel/ptrace.c, exit_ptrace).
    fn let_go(&mut self) {
        for (tid, state) in &self.threads {
            if let State::Stands { signal } = state {
                ptrace(libc::PTRACE_DETACH, *tid, *signal as usize);
            }
        }
        self.threads.clear();
    }
}

fn ptrace(request: libc::c_uint, tid: i32, data: usize) -> libc::c_long {
    // SAFETY: SEIZE, INTERRUPT and DETACH take no address and touch no memory of this process;
    // `data` is an option word or a signal number.
    unsafe { libc::ptrace(request, tid, 0usize, data) }
}

fn status_field(tid: i32, key: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix(key).map(|v| v.trim().to_owned()))
}

fn state_of(tid: i32) -> char {
    status_field(tid, "State:").and_then(|s| s.chars().next()).unwrap_or('X')
}

fn alive(tid: i32) -> bool {
    !matches!(state_of(tid), 'X' | 'Z')
}

fn is_zombie(tid: i32) -> bool {
    matches!(state_of(tid), 'Z' | 'X')
}

fn tracer_of(tid: i32) -> u32 {
    status_field(tid, "TracerPid:").and_then(|p| p.parse().ok()).unwrap_or(0)
}

fn traced(tid: i32) -> bool {
    tracer_of(tid) != 0
}

/// Whether a thread of this very process traces it: TracerPid is that thread's group.
fn own_tracer(tid: i32) -> bool {
    let tracer = tracer_of(tid);
    fs::metadata(format!("/proc/self/task/{tracer}")).is_ok()
}

fn stuck_in_vfork(tid: i32) -> bool {
    if state_of(tid) != 'D' {
        return false;
    }
    let call = fs::read_to_string(format!("/proc/{tid}/syscall")).unwrap_or_default();
    let number = call.split(' ').next().and_then(|n| n.parse::<i64>().ok());
    matches!(number, Some(libc::SYS_vfork | libc::SYS_clone | libc::SYS_clone3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn limits() -> Limits {
        Limits { reach: Duration::from_secs(5), stand: Duration::from_secs(10) }
    }

    /// Children of several threads' worth: a shell with children that count in files. They end by themselves should the
    /// test be killed.
    fn busy(dir: &std::path::Path) -> std::process::Child {
        let script = "for n in 1 2 3; do (i=0; while [ $i -lt 3000000 ]; do i=$((i+1)); echo $i > $0/$n; done) & done; wait";
        let child = Command::new("sh").args(["-c", script]).arg(dir).stdin(Stdio::null()).spawn().unwrap();
        until(|| (1..=3).all(|n| !fs::read(dir.join(n.to_string())).unwrap_or_default().is_empty()));
        child
    }

    fn until(mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < deadline, "the condition did not come true");
            std::thread::yield_now();
        }
    }

    fn counts(dir: &std::path::Path) -> Vec<Vec<u8>> {
        (1..=3).map(|n| fs::read(dir.join(n.to_string())).unwrap()).collect()
    }

    fn members_of(pid: u32) -> Members {
        Box::new(move || {
            let mut processes: Vec<u32> =
                crate::primary::process::tree_of(pid).unwrap().iter().map(|t| t.tgid).collect();
            processes.dedup();
            Ok(processes)
        })
    }

    #[test]
    fn processes_stand_and_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = busy(dir.path());
        let mut ptrace = Ptrace::new(members_of(child.id()));
        for _ in 0..5 {
            let stopped = ptrace.stop(limits()).unwrap();
            assert_eq!(stopped.threads, 4);
            assert!(ptrace.standing());
            let before = counts(dir.path());
            std::thread::sleep(Duration::from_millis(30));
            assert_eq!(counts(dir.path()), before, "they do not run while they stand");
            assert!(ptrace.go().unwrap() >= Duration::from_millis(30));
            until(|| counts(dir.path()).iter().zip(&before).all(|(a, b)| a != b));
        }
        let tree = crate::primary::process::tree_of(child.id()).unwrap();
        for task in tree {
            let pid = rustix::process::Pid::from_raw(task.tgid as i32).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        child.wait().unwrap();
    }

    #[test]
    fn threads_of_one_process_stand() {
        let script = "import threading,time,sys\n\
            c=[0]*4\n\
            def f(n):\n\
            \x20 while True: c[n]+=1\n\
            [threading.Thread(target=f,args=(n,),daemon=True).start() for n in range(4)]\n\
            print('x',flush=True)\n\
            time.sleep(100)";
        let Ok(mut child) = Command::new("python3").args(["-c", script]).stdout(Stdio::piped()).spawn()
        else {
            panic!("this test needs python3");
        };
        io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        let mut ptrace = Ptrace::new(members_of(child.id()));
        assert_eq!(ptrace.stop(limits()).unwrap().threads, 5);
        for task in fs::read_dir(format!("/proc/{}/task", child.id())).unwrap() {
            let tid = task.unwrap().file_name().to_str().unwrap().parse().unwrap();
            assert_eq!(state_of(tid), 't');
        }
        ptrace.go().unwrap();
        until(|| state_of(child.id() as i32) == 'S');
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn without_the_list_of_the_processes_there_is_no_stop() {
        let mut ptrace = Ptrace::new(Box::new(|| Err(io::Error::from_raw_os_error(libc::ENOSPC))));
        assert!(matches!(ptrace.stop(limits()), Err(StopError::System { .. })));
        assert!(!ptrace.standing());
    }

    #[test]
    fn a_stop_ends_at_its_limit_by_itself() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let mut ptrace = Ptrace::new(members_of(child.id()));
        ptrace.stop(Limits { reach: Duration::from_secs(5), stand: Duration::from_millis(50) }).unwrap();
        until(|| state_of(child.id() as i32) == 'S');
        assert!(!ptrace.standing());
        assert!(matches!(ptrace.go(), Err(StopError::LetGo { .. })));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
