"""Where and how stages run: the artifact store, the executors, the scheduler, the runner."""
