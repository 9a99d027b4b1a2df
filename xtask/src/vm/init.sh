#!/bin/sh
# The first process of the virtual machine: the machine's files below, memory above them, and what is asked for in between.
# $1 is the directory with the kernel's modules and the commands.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t tmpfs tmpfs /tmp
modprobe --dirname "$1/kernel" overlay
mkdir /tmp/upper /tmp/work /tmp/root
mount -t overlay -o lowerdir=/,upperdir=/tmp/upper,workdir=/tmp/work overlay /tmp/root
cd /tmp/root || exit
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t devtmpfs devtmpfs dev
mkdir -p dev/pts dev/shm lib/modules
mount -t devpts devpts dev/pts
for memory in dev/shm tmp run var/tmp; do mount -t tmpfs tmpfs $memory; done
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
mount -t tracefs tracefs sys/kernel/tracing
ln -s "$1/kernel/lib/modules/$(uname -r)" lib/modules/
pivot_root . mnt
cd /
ip link set lo up
echo "pclive-vm: begins"
# Not to the terminal itself: nobody is to write colours.
{ /bin/sh "$1/commands" </dev/null; echo "pclive-vm: status $?"; } 2>&1 | cat
echo o >/proc/sysrq-trigger
sleep 60
