"""What a checkpoint is: geometry, packs, manifest, checksums. Knows no ranks and no backends. See SPEC.md."""
