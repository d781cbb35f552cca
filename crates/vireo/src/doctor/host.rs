//! The examinations, one function each.

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
};

use vireo_api::ByteSize;
use vireo_cpu_kvm::Ring0Speed;
use vireo_image::StateDir;

use super::Finding;

/// What one ordinary guest takes.
const GUEST_MEMORY: u64 = 1 << 30;
/// An image and the packages that it is made of.
const IMAGE_DISK: u64 = 2 << 30;

pub fn examine(state: &StateDir) -> Vec<Finding> {
    vec![
        kvm(),
        cpu(),
        memory(),
        disk(state.path()),
        state_folder(state.path()),
        user_namespaces(),
        cgroups(),
        tun(),
        ping(),
        image_tools(),
    ]
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn kvm() -> Finding {
    const WHAT: &str = "KVM";
    match vireo_cpu_kvm::probe().speed {
        Ring0Speed::Native => Finding::ok(WHAT, "guest kernels run at native speed; --accel auto takes it"),
        Ring0Speed::Emulated { ns_per_instruction } => Finding::warn(
            WHAT,
            format!("/dev/kvm answers, but emulates guest kernels at {ns_per_instruction:.0} ns an instruction"),
            "nothing to do: --accel auto takes the software engine; for native speed, turn on nested \
             virtualization (VT-x or AMD-V) for this machine",
        ),
        Ring0Speed::Unavailable { why, remedy } => {
            let remedy = if remedy.is_empty() { "nothing to do".to_owned() } else { remedy };
            Finding::warn(WHAT, why, format!("{remedy}; until then --accel auto takes the software engine"))
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn cpu() -> Finding {
    const WHAT: &str = "CPU";
    let features = [
        ("SSE4.2", std::arch::is_x86_feature_detected!("sse4.2")),
        ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
        ("BMI2", std::arch::is_x86_feature_detected!("bmi2")),
        ("FMA", std::arch::is_x86_feature_detected!("fma")),
        ("AES", std::arch::is_x86_feature_detected!("aes")),
        ("SHA", std::arch::is_x86_feature_detected!("sha")),
    ];
    let list = |there: bool| features.iter().filter(|f| f.1 == there).map(|f| f.0).collect::<Vec<_>>().join(" ");
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let found = format!("{count} x86-64 CPUs with {}", list(true));
    let lacking = list(false);
    if lacking.is_empty() {
        return Finding::ok(WHAT, found);
    }
    Finding::warn(
        WHAT,
        format!("{found}; without {lacking}"),
        "guests under the software engine do not see these either",
    )
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu() -> Finding {
    Finding::fail("CPU", format!("this host is {}", std::env::consts::ARCH), "run Vireo on an x86-64 host")
}

fn memory() -> Finding {
    const WHAT: &str = "memory";
    let text = read("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    };
    let (Some(total), Some(available)) = (field("MemTotal:"), field("MemAvailable:")) else {
        return Finding::warn(WHAT, "/proc/meminfo cannot be read", "mount /proc");
    };
    let found = format!("{} available of {}", ByteSize(available), ByteSize(total));
    if available >= GUEST_MEMORY {
        Finding::ok(WHAT, found)
    } else {
        Finding::warn(WHAT, found, "an ordinary guest wants 1 GiB: give smaller ones --memory, or end other programs")
    }
}

/// The nearest folder that is there: what would be made is made on its file system.
fn existing(path: &Path) -> PathBuf {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn disk(state: &Path) -> Finding {
    const WHAT: &str = "disk";
    let at = existing(state);
    match available_bytes(&at) {
        Some(bytes) if bytes >= IMAGE_DISK => Finding::ok(WHAT, format!("{} free for images", ByteSize(bytes))),
        Some(bytes) => Finding::warn(
            WHAT,
            format!("{} free for images in '{}'", ByteSize(bytes), state.display()),
            "building an image takes about 2 GiB: free some, or choose another place with --state or VIREO_STATE",
        ),
        None => {
            Finding::warn(WHAT, format!("the free space at '{}' is not known", at.display()), "check the file system")
        }
    }
}

fn available_bytes(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn state_folder(state: &Path) -> Finding {
    const WHAT: &str = "state folder";
    let at = existing(state);
    let writable = rustix::fs::access(&at, rustix::fs::Access::WRITE_OK).is_ok();
    if writable {
        return Finding::ok(WHAT, state.display().to_string());
    }
    let remedy = "choose one that you may write to with --state or VIREO_STATE";
    Finding::fail(WHAT, format!("'{}' cannot be written to", at.display()), remedy)
}

fn user_namespaces() -> Finding {
    const WHAT: &str = "user namespaces";
    if rustix::process::geteuid().is_root() {
        return Finding::ok(WHAT, "not needed: running as root");
    }
    let most = read("/proc/sys/user/max_user_namespaces").and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    let restricted = read("/proc/sys/kernel/unprivileged_userns_clone").as_deref() == Some("0")
        || read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").as_deref() == Some("1");
    if most == 0 || restricted {
        return Finding::warn(
            WHAT,
            "this host does not let users make them",
            "building images needs them (running does not): sysctl kernel.unprivileged_userns_clone=1 \
             kernel.apparmor_restrict_unprivileged_userns=0, or build as root",
        );
    }
    let name = std::env::var("USER").unwrap_or_default();
    let uid = rustix::process::getuid().as_raw().to_string();
    let has_range = |file: &str| {
        read(file).is_some_and(|text| {
            text.lines().filter_map(|line| line.split(':').next()).any(|owner| owner == name || owner == uid)
        })
    };
    if has_range("/etc/subuid") && has_range("/etc/subgid") && in_path("newuidmap") {
        return Finding::ok(WHAT, "available, with ranges in /etc/subuid and /etc/subgid");
    }
    Finding::warn(
        WHAT,
        "available, but without newuidmap or a range of ids for you",
        "to build images: apt-get install uidmap, and as root usermod --add-subuids 100000-165535 \
         --add-subgids 100000-165535 YOUR-NAME",
    )
}

fn cgroups() -> Finding {
    const WHAT: &str = "cgroups";
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        let controllers = read("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
        return Finding::ok(WHAT, format!("version 2 with {controllers}"));
    }
    match read("/proc/self/cgroup") {
        Some(text) if text.lines().any(|line| !line.starts_with("0::")) => {
            Finding::ok(WHAT, "version 1 (or hybrid) hierarchies")
        }
        _ => Finding::warn(
            WHAT,
            "none are mounted",
            "needed for resource limits only: mount -t cgroup2 none /sys/fs/cgroup",
        ),
    }
}

fn tun() -> Finding {
    const WHAT: &str = "tun";
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Finding::ok(WHAT, "/dev/net/tun can be opened; --net tap=NAME works with existing taps"),
        Err(error) => Finding::warn(
            WHAT,
            format!("/dev/net/tun cannot be opened: {error}"),
            "needed for --net tap=NAME only (--net user works without): modprobe tun, or ask for access to it",
        ),
    }
}

fn ping() -> Finding {
    const WHAT: &str = "ping";
    if rustix::process::geteuid().is_root() {
        return Finding::ok(WHAT, "guests can ping through --net user");
    }
    let range = read("/proc/sys/net/ipv4/ping_group_range").unwrap_or_default();
    let gid = rustix::process::getgid().as_raw();
    let mut ends = range.split_whitespace().filter_map(|end| end.parse::<u32>().ok());
    match (ends.next(), ends.next()) {
        (Some(first), Some(last)) if (first..=last).contains(&gid) => {
            Finding::ok(WHAT, "guests can ping through --net user")
        }
        _ => Finding::warn(
            WHAT,
            "guests cannot ping outside through --net user (TCP and UDP work)",
            "sysctl net.ipv4.ping_group_range='0 2147483647'",
        ),
    }
}

fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|dir| dir.join(program).is_file())
}

fn image_tools() -> Finding {
    const WHAT: &str = "image tools";
    match vireo_image::check_host() {
        Ok(()) => Finding::ok(WHAT, "all that 'vireo image build' needs is there"),
        Err(error) => Finding::warn(WHAT, "'vireo image build' does not work here", error.to_string()),
    }
}
