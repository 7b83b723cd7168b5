"""Work on stored checkpoints, without a training job: compare, rewrite, convert, tidy up."""
