"""The command `smart`: one file a subcommand, with add_arguments(parser) and main(args)."""
