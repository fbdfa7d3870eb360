#!/bin/sh
# What `make test-browser` needs beside the lock: Playwright, axe, and a Chromium to drive.
set -eu
cd "$(dirname "$0")/../.."
.venv/bin/python -m pip install --quiet --requirement requirements/browser.txt \
    --constraint "requirements/linux-$(uname -m).txt"
for browser in ${CHROMIUM:+"$CHROMIUM"} chromium chromium-browser google-chrome; do
    if command -v "$browser" >/dev/null; then exit 0; fi
done
for browser in "${PLAYWRIGHT_BROWSERS_PATH:-$HOME/.cache/ms-playwright}"/chromium-*; do
    if [ -d "$browser" ]; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium"
    if apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null; then exit 0; fi
fi
echo "error: there is no Chromium: install your system's (on Debian as root: apt-get install chromium), or run" >&2
echo "       .venv/bin/playwright install --with-deps chromium, or set CHROMIUM to the path of one" >&2
exit 2
