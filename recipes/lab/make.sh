#!/bin/sh
# Make the lab's start models again (about two minutes each): well and badly taught to read feedback.
set -eu
cd "$(dirname "$0")"
python ../quickstart/make_model.py --recipe addition.yaml --bits 0 --out well-taught
python ../quickstart/make_model.py --recipe addition.yaml --bits 0 --steps 700 --reading 0.08 --out badly-taught
python make_speller.py
