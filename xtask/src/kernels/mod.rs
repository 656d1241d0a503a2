//! `cargo xtask test kernels`: the end-to-end tests that need nothing but our own programs, on other
//! kernels: those of Debian's releases, in QEMU without KVM, unpacked but never installed.
//!
//! [`fetch`] gets a kernel and its modules, [`guest`] puts a root file system together and boots it.

mod fetch;
mod guest;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use crate::setup::{self, Tool};
use crate::shell::{cargo, run, target};
use crate::test::{PROFILE, Totals, runners};

/// Releases of Debian whose kernels are tried: 6.1, 6.12, and the newest that there is.
const RELEASES: [&str; 3] = ["bookworm", "bookworm-backports", "sid"];

/// What is needed beside the tools of the other tests.
const TOOLS: [Tool; 5] = [
    ("qemu-system-x86_64", "qemu-system-x86", "runs other kernels"),
    ("busybox", "busybox-static", "the shell inside the machine that QEMU runs"),
    ("cpio", "cpio", "packs the root file system of that machine"),
    ("depmod", "kmod", "says which kernel module needs which"),
    ("xz", "xz-utils", "unpacks kernel modules"),
];

/// Runs the tests on each kernel whose version begins with one of `wanted` (all, without any); with `only`, one of the test
/// programs.
///
/// # Errors
/// When something that is needed cannot be had.
pub fn test(wanted: &[String], only: Option<&str>) -> Result<ExitCode> {
    only.map(guest::knows).transpose()?;
    setup::setup(true)?;
    setup::tools(&TOOLS)?;
    run(cargo().args(["build", PROFILE, "--workspace", "--bins"]))?;
    let built = runners(&["--test", "*"])?;
    let folder = target().join("kernels");
    let archive = fetch::Archive::open(&folder, &RELEASES)?;
    let mut totals = Totals::default();
    let mut tried = 0;
    for release in RELEASES {
        let kernel = archive.kernel(release).with_context(|| format!("the kernel of {release}"))?;
        if !wanted.is_empty() && !wanted.iter().any(|w| kernel.version.starts_with(w.as_str())) {
            continue;
        }
        tried += 1;
        println!("+ kernel {} (of {release})", kernel.version);
        let sum = guest::run(&kernel, &folder, &built, only)?;
        println!("kernel {}: {} passed, {} failed", kernel.version, sum.passed, sum.failed);
        totals.add(sum);
    }
    ensure!(tried > 0, "none of the kernels has a version that begins with {}", wanted.join(" or "));
    Ok(totals.verdict())
}
