"""Running a model for its tokens: sampling and generation."""
