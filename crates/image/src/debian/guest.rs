//! The files that make an installed Debian a guest of Vireo.

use std::io::Write;

use super::{
    selection::{MASKED_GENERATORS, MASKED_UNITS, UNWANTED},
    tree::{TreeError, TreeWriter},
};

/// What the files depend on.
pub struct Guest<'a> {
    pub hostname: &'a str,
    /// Lines of `/etc/apt/sources.list.d/debian.sources`.
    pub sources: &'a str,
    pub agent: Option<&'a [u8]>,
    pub has_ssh_server: bool,
}

/// What packages bring that a machine does not need to run: left out from the start, and by dpkg in the guest too.
const EXCLUDED: [&str; 6] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
    "/usr/share/locale/*",
    "/boot/System.map-*",
];

/// What stays of it: licences, and the names of locales.
const INCLUDED: [&str; 2] = ["/usr/share/doc/*/copyright", "/usr/share/locale/locale.alias"];

/// Whether a path of a package (without a leading slash) is left out.
pub fn is_excluded(path: &str) -> bool {
    let matches = |pattern: &&str| {
        let (start, end) =
            pattern.trim_start_matches('/').split_once('*').unwrap_or((pattern.trim_start_matches('/'), ""));
        path.len() >= start.len() + end.len() && path.starts_with(start) && path.ends_with(end)
    };
    EXCLUDED.iter().any(&matches) && !INCLUDED.iter().any(matches)
}

fn dpkg_excludes() -> String {
    let mut text =
        "# Written by vireo image build. Remove this file and reinstall a package to have its documentation.\n"
            .to_owned();
    text.extend(EXCLUDED.iter().map(|pattern| format!("path-exclude={pattern}\n")));
    text.extend(INCLUDED.iter().map(|pattern| format!("path-include={pattern}\n")));
    text
}

const AGENT_UNIT: &str = "\
[Unit]
Description=Vireo guest agent
DefaultDependencies=no
# The initrd has loaded the driver where the machine has the device.
ConditionPathExists=/dev/vsock
# Commands may write below /tmp and /run: those are mounted, and what an earlier boot left is cleared, by then.
# The network is not waited for.
After=local-fs.target systemd-tmpfiles-setup.service systemd-journald.socket
Conflicts=shutdown.target
Before=shutdown.target

[Service]
ExecStart=/usr/lib/vireo/agent
Restart=always
RestartSec=1
KillMode=process
OOMScoreAdjust=-900
TasksMax=infinity

[Install]
WantedBy=sysinit.target
";

const NETWORK: &str = "\
[Match]
Name=en* eth*

[Network]
DHCP=yes
IPv6AcceptRA=yes
# What the initrd has set up stays, and is what DHCP says: connections that are open by then go on.
KeepConfiguration=static

[DHCPv4]
# By the address of the card: clones of an image, whose machine ids may be equal, get different leases.
ClientIdentifier=mac
";

const JOURNAL: &str = "\
[Journal]
# In memory. To keep it: remove this file, make /var/log/journal, unmask systemd-journal-flush.service.
Storage=volatile
RuntimeMaxUse=16M
";

const RESOLVED: &str = "\
[Resolve]
# Names on the local link are not looked for, nor answered.
LLMNR=no
MulticastDNS=no
";

const SSH_KEYS: &str = "\
[Service]
# The image has no host keys: each machine makes its own.
ExecStartPre=
ExecStartPre=/usr/bin/ssh-keygen -A
ExecStartPre=/usr/sbin/sshd -t
";

const HOSTS: &str = "\
127.0.0.1\tlocalhost
::1\t\tlocalhost ip6-localhost ip6-loopback
ff02::1\t\tip6-allnodes
ff02::2\t\tip6-allrouters
";

/// The files that must be there before the first package is configured.
pub fn write_first(tree: &mut TreeWriter<impl Write>, hostname: &str) -> Result<(), TreeError> {
    for directory in [
        "dev",
        "etc",
        "etc/apt",
        "etc/dpkg",
        "etc/dpkg/dpkg.cfg.d",
        "etc/initramfs-tools",
        "proc",
        "root",
        "run",
        "sys",
        "tmp",
    ] {
        tree.directory(directory, if directory == "tmp" { 0o1777 } else { 0o755 })?;
    }
    // bookworm's base-files leaves the links of the merged /usr to the installer.
    for name in ["bin", "sbin", "lib", "lib64"] {
        tree.directory(&format!("usr/{name}"), 0o755)?;
        tree.symlink(name, &format!("usr/{name}"))?;
    }
    // Empty, but there: alternatives (Java's, say) come with links to manual pages, and fail without a place for them.
    for section in 1..=9 {
        tree.directory(&format!("usr/share/man/man{section}"), 0o755)?;
    }
    tree.file("etc/hostname", 0o644, format!("{hostname}\n").as_bytes())?;
    tree.file("etc/hosts", 0o644, HOSTS.as_bytes())?;
    tree.file(
        "etc/fstab",
        0o644,
        b"# The root file system is mounted by the initrd, as the kernel command line says.\n",
    )?;
    tree.file("etc/dpkg/dpkg.cfg.d/vireo", 0o644, dpkg_excludes().as_bytes())?;
    // The VMM loads kernel and initrd from the image's directory: none is made in the guest.
    tree.file("etc/initramfs-tools/update-initramfs.conf", 0o644, b"update_initramfs=no\nbackup_initramfs=no\n")?;
    tree.file("usr/sbin/policy-rc.d", 0o755, b"#!/bin/sh\nexit 101\n")?;
    tree.directory("var/lib/dpkg/info", 0o755)?;
    tree.directory("var/lib/dpkg/updates", 0o755)?;
    tree.file("var/lib/dpkg/status", 0o644, b"")?;
    tree.file("var/lib/dpkg/available", 0o644, b"")
}

/// The files that are laid over the installed system.
pub fn write_last(tree: &mut TreeWriter<impl Write>, guest: &Guest<'_>) -> Result<(), TreeError> {
    tree.file("etc/apt/sources.list.d/debian.sources", 0o644, guest.sources.as_bytes())?;
    tree.file("etc/locale.conf", 0o644, b"LANG=C.UTF-8\n")?;
    tree.symlink("etc/default/locale", "../locale.conf")?;
    tree.file("etc/hostname", 0o644, format!("{}\n", guest.hostname).as_bytes())?;
    tree.file("etc/systemd/journald.conf.d/vireo.conf", 0o644, JOURNAL.as_bytes())?;
    tree.file("etc/systemd/resolved.conf.d/vireo.conf", 0o644, RESOLVED.as_bytes())?;
    tree.file("etc/systemd/network/80-vireo.network", 0o644, NETWORK.as_bytes())?;
    tree.symlink("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")?;
    for generator in MASKED_GENERATORS {
        tree.symlink(&format!("etc/systemd/system-generators/{generator}"), "/dev/null")?;
    }
    for unit in MASKED_UNITS.into_iter().chain(UNWANTED) {
        tree.symlink(&format!("etc/systemd/system/{unit}"), "/dev/null")?;
    }
    if guest.has_ssh_server {
        tree.file("etc/systemd/system/ssh.service.d/vireo.conf", 0o644, SSH_KEYS.as_bytes())?;
    }
    if let Some(agent) = guest.agent {
        tree.directory("usr/lib/vireo", 0o755)?;
        tree.file("usr/lib/vireo/agent", 0o755, agent)?;
        tree.file("usr/lib/systemd/system/vireo-agent.service", 0o644, AGENT_UNIT.as_bytes())?;
        tree.symlink(
            "etc/systemd/system/sysinit.target.wants/vireo-agent.service",
            "/usr/lib/systemd/system/vireo-agent.service",
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documentation_is_left_out_and_licences_stay() {
        for path in [
            "usr/share/doc/bash/README",
            "usr/share/man/man1",
            "usr/share/locale/de/LC_MESSAGES/x.mo",
            "boot/System.map-6.1",
        ] {
            assert!(is_excluded(path), "{path}");
        }
        for path in [
            "usr/share/doc",
            "usr/share/doc/bash/copyright",
            "usr/share/locale/locale.alias",
            "usr/bin/man",
            "boot/vmlinuz-6.1",
        ] {
            assert!(!is_excluded(path), "{path}");
        }
    }
}
