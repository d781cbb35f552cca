# Installs the guest and writes its file system. Runs as process 1 of its own namespaces, as (mapped) root.
#   $root   empty directory that becomes the guest's root     $work   lists of packages, guest.tar
#   $debs   the packages as NAME.deb                            $image  file to write, $image_kib its size
#   $tmpfs  size in bytes of the memory to work in, 0 to work on the disk
# The first tree comes on stdin as a tar stream. Lines that begin with "vireo:" on stdout are for the caller.
set -eu
umask 022

# INITRD=No: the kernel's hooks make no initrd in the guest, Vireo's is used.
in_root() {
	chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LC_ALL=C.UTF-8 \
		DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true INITRD=No "$@" </dev/null
}

guest_dpkg() {
	in_root dpkg --force-unsafe-io --force-confold "$@"
}

# The paths of the packages that a list names, as the guest sees them.
paths() {
	for name in $(cat "$work/$1"); do
		echo "/var/tmp/vireo/$name.deb"
	done
}

# Configures those of a list that are not configured yet; dpkg takes it amiss to be asked twice.
configure_new() {
	pending=
	for name in $(cat "$work/$1"); do
		state=$(in_root dpkg-query --show --showformat='${db:Status-Status}' "$name")
		[ "$state" = installed ] || pending="$pending $name"
	done
	[ -z "$pending" ] || guest_dpkg --configure $pending
}

core() {
	if grep -qx "$1" "$work/required"; then
		guest_dpkg --force-depends --install "/var/tmp/vireo/$1.deb"
	fi
}

[ "$tmpfs" = 0 ] || mount -t tmpfs -o "mode=0755,size=$tmpfs" vireo "$root"
tar --extract --file=- --preserve-permissions --numeric-owner --same-owner --directory="$root"

echo "vireo: install"
# In a container /proc may be partly hidden, and then a new one is refused.
mount -t proc proc "$root/proc" 2>/dev/null || mount --rbind /proc "$root/proc"
mount -t tmpfs -o mode=0755 dev "$root/dev"
for node in null zero full random urandom tty; do
	: >"$root/dev/$node"
	mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir -m 1777 "$root/dev/shm"
ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"
ln -s /proc/self/fd/1 "$root/dev/stdout"
ln -s /proc/self/fd/2 "$root/dev/stderr"
mount -t tmpfs -o mode=0755 run "$root/run"
mkdir -p "$root/var/tmp/vireo"
mount --bind "$debs" "$root/var/tmp/vireo"

# The order of debootstrap: what dpkg and maintainer scripts stand on comes first, one by one.
in_root ldconfig
ln -sf mawk "$root/usr/bin/awk"
core base-passwd
core base-files
core dpkg
[ -e "$root/etc/localtime" ] || ln -sf /usr/share/zoneinfo/UTC "$root/etc/localtime"
core libc6
core perl-base
rm -f "$root/usr/bin/awk"
core mawk
core debconf
guest_dpkg --force-depends --unpack $(paths required)
guest_dpkg --force-configure-any --force-depends --configure --pending

group=0
while [ -e "$work/group-$group" ]; do
	configure_new "before-$group"
	guest_dpkg --unpack $(paths "group-$group")
	group=$((group + 1))
done
guest_dpkg --configure --pending

echo "vireo: finish"
tar --extract --file="$work/guest.tar" --preserve-permissions --numeric-owner --same-owner --directory="$root"
in_root systemctl --quiet enable $(cat "$work/enable")
if [ -e "$work/root-password" ]; then
	chroot "$root" /usr/sbin/chpasswd <"$work/root-password"
fi
umount "$root/var/tmp/vireo"
rmdir "$root/var/tmp/vireo"
umount "$root/run"
umount -R "$root/dev"
umount -R "$root/proc"

cd "$root"
rm -rf usr/sbin/policy-rc.d tmp/* var/tmp/* var/cache/apt/* var/lib/apt/lists/* var/cache/debconf/*-old \
	var/cache/ldconfig/aux-cache var/lib/dpkg/*-old var/log/apt var/log/*.log var/log/journal \
	etc/passwd- etc/group- etc/shadow- etc/gshadow- etc/subuid- etc/subgid- \
	var/lib/dbus/machine-id var/lib/systemd/random-seed var/lib/systemd/catalog/database.tmp \
	etc/ssh/ssh_host_*_key etc/ssh/ssh_host_*_key.pub
: >etc/machine-id
# Says that nothing in /etc and /var is older than /usr: else the first boot rebuilds caches that are fresh.
for dir in etc var; do
	echo "# The configuration is as new as /usr; see systemd-update-done.service(8)." >"$dir/.updated"
	touch -r usr "$dir/.updated"
done
cd /

echo "vireo: filesystem"
# Features are named, not left to the host's mke2fs.conf. Without metadata checksums the guest computes none at each
# write; the journal is small because it only has to hold what is in flight.
MKE2FS_CONFIG=/dev/null mke2fs -q -F -t ext4 -L root -m 0 -b 4096 -I 256 -i 16384 -J size=16 \
	-O none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize \
	-E lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 -d "$root" "$image" "$image_kib"
echo "vireo: done"
