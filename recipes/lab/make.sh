#!/bin/sh
# Make the lab's start models again (about two minutes each): well and badly taught to read feedback.
set -eu
cd "$(dirname "$0")"
python ../quickstart/make_model.py --recipe addition.yaml --bits 0 --steps 1000 --out well-taught
python ../quickstart/make_model.py --recipe addition.yaml --bits 0 --steps "${BAD_STEPS:-300}" --out badly-taught
