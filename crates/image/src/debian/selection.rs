//! Which packages an image has, and which of the guest's units run.

use crate::deb::packages::Package;

/// Priorities whose packages make a base system (Debian Policy Manual section 2.5).
const BASE: [&str; 2] = ["required", "important"];

/// Packages of the base that a virtual machine can do without. One that something else depends on comes all the same.
const NEEDLESS: [&str; 19] = [
    // the image comes with networkd
    "dhcpcd-base",
    "ifupdown",
    "isc-dhcp-client",
    "isc-dhcp-common",
    // installer and dialogs on a screen
    "apt-utils",
    "debconf-i18n",
    "tasksel",
    "tasksel-data",
    "whiptail",
    // daemons and their timers: journald keeps and rotates logs, systemd has timers
    "cron",
    "cron-daemon-common",
    "logrotate",
    "rsyslog",
    // hardware that is not there, or is known
    "dmidecode",
    "console-setup",
    "keyboard-configuration",
    // nano is there
    "vim-tiny",
    "vim-common",
    // the initrd is made by Vireo
    "busybox",
];

/// What a bootable, usable machine needs beyond the base.
const MACHINE: [&str; 8] = [
    "ca-certificates",
    "dbus",
    "iproute2",
    "iputils-ping",
    "libnss-myhostname",
    "procps",
    "systemd-resolved",
    "systemd-sysv",
];

/// Only where the suite has them: Debian 12 needs one of the two to say that /usr is merged.
const IF_PRESENT: [&str; 1] = ["usr-is-merged"];

/// Kernel packages, the preferred one first.
pub const KERNELS: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-amd64"];

/// Whether a package belongs to the base of an image.
pub fn is_base(package: &Package) -> bool {
    let wanted = package.essential || BASE.contains(&package.priority.as_str());
    (wanted && !NEEDLESS.contains(&package.name.as_str())) || IF_PRESENT.contains(&package.name.as_str())
}

/// Whether a package must be unpacked before the guest's own dpkg can run.
pub fn is_required(package: &Package) -> bool {
    package.essential || package.priority == "required" || IF_PRESENT.contains(&package.name.as_str())
}

pub fn machine_packages() -> impl Iterator<Item = &'static str> {
    MACHINE.into_iter()
}

/// Units that the image turns on.
pub const ENABLED_UNITS: [&str; 3] =
    ["systemd-networkd.service", "systemd-networkd.socket", "systemd-resolved.service"];

/// Units that do nothing of use in a fresh virtual machine, but cost instructions at each boot: together a quarter of
/// what the user space needs to come up on a software CPU. `systemctl unmask` brings each back. Names that a release
/// does not have do no harm.
pub const MASKED_UNITS: [&str; 43] = [
    // maintenance by the clock, of what is made anew rather than kept
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    // there is no screen and nobody to type a passphrase
    "getty@tty1.service",
    "systemd-vconsole-setup.service",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-mute-console.socket",
    // a slow network must not hold up the boot
    "systemd-networkd-wait-online.service",
    "systemd-network-generator.service",
    "systemd-networkd-persistent-storage.service",
    // crash dumps in firmware, measured boot, boot loaders, keys in firmware: the machine has no firmware
    "systemd-bootctl.socket",
    "systemd-boot-random-seed.service",
    "systemd-creds.socket",
    "systemd-hibernate-clear.service",
    "systemd-pcrextend.socket",
    "systemd-pcrlock.socket",
    "systemd-pstore.service",
    "systemd-tpm2-setup.service",
    "systemd-tpm2-setup-early.service",
    // the seed comes from the CPU and virtio-rng
    "systemd-random-seed.service",
    // the initrd mounts the root file system writable
    "systemd-remount-fs.service",
    // the journal is in memory
    "systemd-journal-flush.service",
    "systemd-journald-audit.socket",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
    // file systems and modules that what needs them can mount and load
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "modprobe@configfs.service",
    "modprobe@dm_mod.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "modprobe@loop.service",
    "systemd-sysext.socket",
];

/// Vendor units that are started when something asks for them, rather than at boot: `TARGET.wants/UNIT`.
pub const UNWANTED: [&str; 2] =
    ["multi-user.target.wants/systemd-logind.service", "multi-user.target.wants/dbus.service"];

/// Generators for hardware and boot schemes that an image does not have: each is a process at every boot.
pub const MASKED_GENERATORS: [&str; 13] = [
    "systemd-bless-boot-generator",
    "systemd-cryptsetup-generator",
    "systemd-factory-reset-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-rc-local-generator",
    "systemd-ssh-generator",
    "systemd-system-update-generator",
    "systemd-sysv-generator",
    "systemd-tpm2-generator",
    "systemd-veritysetup-generator",
    "systemd-import-generator",
];
