#!/bin/bash
# Install what the tests of lagging and failing filesystems need, on Debian or Ubuntu, as root: libfuse 3.
#
#   sudo tests/contract/install.sh
exec "$(dirname "$0")/../install_packages.sh" "The tests of lagging filesystems" tests/contract/install.sh \
  "fusermount3 unshare" fuse3 util-linux
