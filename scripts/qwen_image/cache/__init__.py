"""Cache files and their manifests: names, fingerprints, and the two encoders' loops."""
