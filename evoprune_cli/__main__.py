from evoprune_cli.main import run

run()
