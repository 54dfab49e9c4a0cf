#!/bin/sh
# An environment for each tool, .venv-peers/NAME: their pins rule out each other's, and this package's.
#
#   benchmarks/peers/install.sh [NAME...]      of trl, llamafactory, swift; all of them by default
#
# All have this project's torch and Pillow, so that they differ by what is theirs; on a CPU about 2 GB each.
set -eu
cd "$(dirname "$0")/../.."
pins=.venv-peers/torch.txt
mkdir -p .venv-peers
grep '^torch==' constraints.txt > "$pins"

for name in ${*:-trl llamafactory swift}; do
    [ -e ".venv-peers/$name/installed" ] && continue
    echo "installing $name"
    "${PYTHON:-python3}" -m venv ".venv-peers/$name"
    pip=".venv-peers/$name/bin/python -m pip --quiet --disable-pip-version-check"
    case $name in
    trl) $pip install --constraint constraints.txt trl==1.16.0 peft torch ;;
    llamafactory)
        $pip install --constraint "$pins" llamafactory==0.9.5 torch
        # The published builds of these need a CUDA torch. Without them it has no sound (llamafactory_case.py), and
        # pictures go through Pillow, as everywhere else here.
        $pip uninstall --yes torchvision torchaudio
        ;;
    swift) $pip install --constraint "$pins" ms-swift==4.6.0 torch ;;
    *) echo "$name: expected trl, llamafactory or swift" >&2; exit 1 ;;
    esac
    # Older ones make other pixels, in the last bit; it is gradio, for a page that is not opened, that asks for one.
    $pip install --no-deps "$(grep '^pillow==' constraints.txt)"
    touch ".venv-peers/$name/installed"
done
