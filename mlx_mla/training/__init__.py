"""The training run: its loop, its folder, how it starts and how it resumes."""
