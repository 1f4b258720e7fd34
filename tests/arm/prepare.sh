#!/bin/sh
# Prepares an ARM machine that is emulated: prepare.sh FOLDER PYTHON
# Debian's arm64 Python and the vendors' aarch64 wheels, unpacked below FOLDER and installed nowhere, so that it
# needs no root; FOLDER/python runs them. PYTHON is one with pip.
#
# qemu is trixie's on purpose: bookworm's 7.2 crashes on what recent wheels of ONNX Runtime and LiteRT do at
# their start, and on its default processor computes wrong INT8 without a word.
set -eu
python=$2
mkdir -p "$1"
folder=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
rm -rf "$folder/debs" "$folder/root" "$folder/wheels" "$folder/python"
mkdir -p "$folder/apt/lists/partial" "$folder/apt/archives/partial" "$folder/debs"
: > "$folder/apt/status"
# From wherever this machine has its own release.
release=$(. /etc/os-release && echo "$ID/$VERSION_CODENAME")
mirror=$(apt-get update --print-uris | sed -n "s|^'\(.*\)/dists/${release#*/}/InRelease'.*|\1|p" | head -n 1)
if [ "${release%/*}" != debian ] || [ -z "$mirror" ]; then
    echo "this needs Debian and its apt-get; here is $release" >&2
    exit 2
fi
printf "deb $mirror %s main\n" bookworm trixie > "$folder/apt/sources.list"

# Lists of its own, for both architectures: the machine's are left as they are.
apt() {
    apt-get -qq -o APT::Architecture=amd64 -o APT::Architectures=amd64,arm64 -o APT::Sandbox::User= \
        -o Dir::State="$folder/apt" -o Dir::State::status="$folder/apt/status" -o Dir::Cache="$folder/apt" \
        -o Dir::Etc::sourcelist="$folder/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null "$@"
}
apt update
(
    cd "$folder/debs"
    apt download qemu-user:amd64/trixie
    for package in python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libgcc-s1 libstdc++6 \
        libexpat1 zlib1g libssl3 libffi8 libbz2-1.0 liblzma5; do
        apt download "$package:arm64/bookworm"
    done
    for package in *.deb; do
        dpkg -x "$package" ../root
    done
)

"$python" -m pip install --quiet --constraint "$here/../../constraints.txt" --target "$folder/wheels" \
    --python-version 3.11 --only-binary :all: $(printf -- '--platform manylinux_2_%s_aarch64 ' 17 27 28 31 34 35) \
    --platform manylinux2014_aarch64 numpy pillow threadpoolctl typer onnxruntime openvino ai-edge-litert

# With its own name as the program's, so that Python starts its children through it too.
cat > "$folder/python" <<END
#!/bin/sh
exec "$folder/root/usr/bin/qemu-aarch64" -cpu "\${ARM_CPU:-cortex-a72}" -0 "$folder/python" -L "$folder/root" \\
    -E PYTHONHOME="$folder/root/usr" -E PYTHONPATH="\${PYTHONPATH:+\$PYTHONPATH:}$folder/wheels" \\
    "$folder/root/usr/bin/python3.11" "\$@"
END
chmod +x "$folder/python"
