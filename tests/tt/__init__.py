"""Tests of loretta.tt; :mod:`tt.trains` holds the examples and the oracle that they share."""
