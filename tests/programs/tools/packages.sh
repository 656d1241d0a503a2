# dpkg installs, upgrades and removes packages below a directory, until told to stop. $1 data, $2 folder beside it.
set -eu
root="$1/root"
mkdir -p "$root/var/lib/dpkg/info" "$root/var/lib/dpkg/updates" "$root/etc"
: > "$root/var/lib/dpkg/status"
for version in 1 2; do
    tree="$2/tree-$version"
    mkdir -p "$tree/DEBIAN" "$tree/usr/bin" "$tree/usr/share/things/deep" "$tree/etc"
    printf 'Package: things\nVersion: %s\nArchitecture: all\nMaintainer: nobody\nDescription: things\n' $version \
        > "$tree/DEBIAN/control"
    echo /etc/things.conf > "$tree/DEBIAN/conffiles"
    echo "setting $version" > "$tree/etc/things.conf"
    i=0
    while [ $i -lt 120 ]; do
        i=$((i + 1))
        # Some files only in one version, some the same in both.
        [ $((i % 5)) != $version ] || continue
        head -c $((i * 400)) /dev/zero | tr '\0' "$((version * (i % 3)))" > "$tree/usr/share/things/deep/file-$i"
    done
    ln -s ../share/things/deep/file-10 "$tree/usr/bin/thing"
    dpkg-deb --root-owner-group -Znone --build "$tree" "$2/things-$version.deb" > /dev/null
done
: > "$2/ready"
while [ ! -e "$2/stop" ]; do
    for version in 1 2 1; do
        dpkg --root="$root" --force-all --log="$2/dpkg.log" -i "$2/things-$version.deb" > "$2/said" 2>&1
    done
    dpkg --root="$root" --force-all --log="$2/dpkg.log" --purge things > "$2/said" 2>&1
done
