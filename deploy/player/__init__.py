"""Plays the Helm chart in containers: see deploy/play."""
