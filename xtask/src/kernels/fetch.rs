//! Kernels of Debian's releases, from the archive that this machine uses already. They are unpacked
//! below target/; nothing is installed, and the package lists of the system stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::setup::quiet;
use crate::shell::shown;

/// The key with which Debian signs its lists (package debian-archive-keyring).
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The package that depends on the newest kernel of a release.
const NEWEST: &str = "linux-image-amd64";

/// A kernel on disk.
pub struct Kernel {
    /// As `uname -r` says it.
    pub version: String,
    /// The compressed image.
    pub image: PathBuf,
    /// Folder of `modules.dep`.
    pub modules: PathBuf,
}

/// Package lists of our own.
pub struct Archive {
    folder: PathBuf,
    options: Vec<String>,
}

impl Archive {
    /// Fetches the lists of `releases`.
    pub fn open(folder: &Path, releases: &[&str]) -> Result<Self> {
        let apt = folder.join("apt");
        for sub in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(apt.join(sub))?;
        }
        let site = site()?;
        let lines = releases.iter().map(|r| format!("deb [signed-by={KEYRING}] {site} {r} main\n"));
        fs::write(apt.join("sources.list"), lines.collect::<String>())?;
        let at = |name: &str| apt.join(name).display().to_string();
        let options = [
            ("Dir::Etc::sourcelist", at("sources.list")),
            ("Dir::Etc::sourceparts", "-".to_owned()),
            ("Dir::State", at("state")),
            ("Dir::Cache", at("cache")),
            ("Dir::State::status", "/var/lib/dpkg/status".to_owned()),
            // The packages go into a folder that the user `_apt` need not reach.
            ("APT::Sandbox::User", "root".to_owned()),
        ];
        let options = options.iter().flat_map(|(k, v)| ["-o".to_owned(), format!("{k}={v}")]).collect();
        let this = Self { folder: folder.to_owned(), options };
        this.apt("apt-get", &["update", "-qq"])?;
        Ok(this)
    }

    fn apt(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        command.args(&self.options).args(arguments).current_dir(&self.folder);
        let done = command.output().with_context(|| format!("{program} does not start"))?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(done.status.success(), "{}: {}\n{said}", shown(&command), done.status);
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    }

    /// Packages that a package depends on, without versions and alternatives.
    fn depends(&self, package: &str) -> Result<Vec<String>> {
        let text = self.apt("apt-cache", &["show", package])?;
        let line = text.lines().find_map(|l| l.strip_prefix("Depends: ")).unwrap_or_default();
        Ok(line.split(", ").filter_map(|d| d.split(' ').next()).map(str::to_owned).collect())
    }

    /// The newest kernel of a release, fetched and unpacked if it is not there yet.
    pub fn kernel(&self, release: &str) -> Result<Kernel> {
        let image = self.image_of(release)?;
        let version = image.trim_start_matches("linux-image-").to_owned();
        let folder = self.folder.join(&version);
        if !folder.join("complete").exists() {
            println!("kernels: fetching Linux {version}, unpacked into {}", folder.display());
            let _ = fs::remove_dir_all(&folder);
            fs::create_dir_all(&folder)?;
            // From some version on image and modules are packages of their own.
            let parts = ["linux-binary-", "linux-modules-"].map(|p| format!("{p}{version}"));
            let split = self.depends(&image)?.contains(&parts[0]);
            for package in if split { parts.to_vec() } else { vec![image] } {
                self.unpack(&package, &folder)?;
            }
            let base = if folder.join("lib").exists() { folder.clone() } else { folder.join("usr") };
            let root = base.to_str().context("the path is not UTF-8")?;
            quiet(Command::new("/sbin/depmod").args(["-b", root, &version]))?;
            fs::write(folder.join("complete"), "")?;
        }
        let find = |places: [String; 2]| -> Result<PathBuf> {
            let here = places.iter().map(|p| folder.join(p)).find(|p| p.exists());
            here.with_context(|| format!("{} has none of {}", folder.display(), places.join(", ")))
        };
        Ok(Kernel {
            image: find([format!("boot/vmlinuz-{version}"), format!("usr/lib/modules/{version}/vmlinuz")])?,
            modules: find([format!("lib/modules/{version}"), format!("usr/lib/modules/{version}")])?,
            version,
        })
    }

    /// Name of the package with the kernel that a release has now.
    fn image_of(&self, release: &str) -> Result<String> {
        // "linux-image-amd64 | 6.1.1-1 | SITE bookworm/main amd64 Packages"
        let table = self.apt("apt-cache", &["madison", NEWEST])?;
        let rows = table.lines().map(|l| l.split('|').map(str::trim).collect::<Vec<_>>());
        let mut rows = rows.filter(|r| r.len() == 3 && r[2].contains(&format!(" {release}/")));
        let row = rows.next().with_context(|| format!("{release} has no {NEWEST}"))?;
        let depends = self.depends(&format!("{NEWEST}={}", row[1]))?;
        depends
            .into_iter()
            .find(|d| d.starts_with("linux-image-"))
            .with_context(|| format!("{NEWEST} of {release} depends on no kernel"))
    }

    fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        self.apt("apt-get", &["download", "-qq", package])?;
        let prefix = format!("{package}_");
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(&prefix)) {
                quiet(Command::new("dpkg").arg("-x").arg(&path).arg(into))?;
                fs::remove_file(path)?;
                return Ok(());
            }
        }
        bail!("{package} was not fetched")
    }
}

/// The archive that this machine's own lists come from.
fn site() -> Result<String> {
    let done = Command::new("apt-get")
        .args(["indextargets", "--format", "$(SITE) $(RELEASE) $(ORIGIN)", "Created-By: Packages"])
        .output()
        .context("this needs apt-get: the kernels are Debian's")?;
    let text = String::from_utf8_lossy(&done.stdout);
    let mut sites = text.lines().map(|l| l.split(' ').collect::<Vec<_>>());
    let debian = |r: &Vec<&str>| r.get(2) == Some(&"Debian") && r.get(1).is_some_and(|r| !r.contains('-'));
    let row = sites.find(debian).context("apt has no list of Debian's archive: run `apt-get update`")?;
    Ok(row[0].to_owned())
}
