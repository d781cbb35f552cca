#!/bin/sh
# The first process of the guest: loads the drivers of the devices that are there, mounts the root file system and
# hands over to its init. No udev and no search: what a virtual machine has is known.
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys

die() {
	echo "initrd: $*" >/dev/console
	exit 1
}

load() {
	for module in $1; do
		[ -e "/sys/module/$module" ] || insmod "/modules/$module.ko" || echo "initrd: cannot load $module" >/dev/console
	done
}

root=/dev/vda mode=rw flags= fstype=ext4 init=/sbin/init network=
read -r line </proc/cmdline
for word in $line; do
	case $word in
	root=*) root=${word#root=} ;;
	rootflags=*) flags=,${word#rootflags=} ;;
	rootfstype=*) fstype=${word#rootfstype=} ;;
	init=*) init=${word#init=} ;;
	ip=*) network=${word#ip=} ;;
	ro | rw) mode=$word ;;
	esac
done

load "$always"
# virtio 1.2, section 5: device ids.
for device in /sys/bus/virtio/devices/*/device; do
	[ -e "$device" ] || continue
	read -r id <"$device"
	case $id in
	0x0001) load "$net" ;;
	0x0002) load "$block" ;;
	0x0003) load "$console" ;;
	0x0004) load "$rng" ;;
	0x0013) load "$vsock" ;;
	esac
done

# A network that the host knows beforehand is there from the start; the guest's own configuration renews it later.
# ip=ADDRESS::GATEWAY:NETMASK:HOSTNAME:DEVICE:AUTOCONF:DNS (Linux Documentation/admin-guide/nfs/nfsroot.rst)
configure() {
	IFS=: read -r address _ gateway netmask _ device _ dns _ <<END
$1
END
	[ -n "$device" ] && [ -e "/sys/class/net/$device" ] || return
	ip link set lo up
	ip link set "$device" up
	ip address add "$address/$netmask" dev "$device"
	ip route add default via "$gateway"
	# Where the image's /etc/resolv.conf leads to.
	mkdir -p /run/systemd/resolve
	echo "nameserver $dns" >/run/systemd/resolve/stub-resolv.conf
}
mount -t tmpfs -o mode=0755,nosuid,nodev run /run
[ -z "$network" ] || configure "$network"

case $root in
LABEL=* | UUID=*) root=$(findfs "$root") || die "no file system has $root" ;;
esac
# Devices behind other drivers may take a moment.
tries=100
while [ ! -b "$root" ] && [ $tries -gt 0 ]; do
	usleep 50000
	tries=$((tries - 1))
done
[ -b "$root" ] || die "there is no root device '$root'; attach the image's disk or correct root= on the kernel command line"
mount -t "$fstype" -o "$mode$flags" "$root" /root || die "'$root' cannot be mounted as $fstype"
[ -e "/root$init" ] || [ -L "/root$init" ] || die "the file system on '$root' has no '$init'"
for folder in dev proc run sys; do
	mount --move /$folder /root/$folder
done
# What this shell has set is not the guest's business.
unset SHLVL PWD OLDPWD
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec switch_root /root "$init" "$@"
