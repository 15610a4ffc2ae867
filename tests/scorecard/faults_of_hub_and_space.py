"""Faults that come over the network: pushes that break, and what strangers send to the Space."""

from __future__ import annotations

from fault import Fault

PUSH = "hub/test_push_failures.py::"
SERVER = "space/test_space_server.py::"
UPLOADS = "space/test_space_uploads.py::"
PIPELINE = "test_pipeline.py::"
NEW = "scorecard/"

FAULTS = (
    Fault(
        31,
        "no-pickle",
        "C",
        "pickles that run code in place of weights and state files; `pickle` and `torch.load` taken away from the commands",
        "nothing is executed; train, evaluate, predict, label and resume need neither",
        does="reads and writes safetensors and JSON; what it exports is on a list of file names",
        says="`… is damaged`, or that no safetensors file is there",
        then="take a model in safetensors",
        tests=(
            "training/test_state_files.py::test_pickle_in_place_of_a_state_file_is_refused_and_not_run",
            "models/test_backbone_weights.py::test_pickles_and_unknown_sources_are_refused",
            "space/test_space_segmenter.py::test_pickled_weights_are_not_loaded",
            "hub/test_round_trip.py::test_a_run_is_pushed_in_one_commit_and_only_what_is_on_the_list",
            NEW + "test_no_pickle.py::test_31_the_commands_work_without_pickle",
        ),
        slow=True,
    ),
    Fault(
        32,
        "push-interrupt",
        "C",
        "the connection breaks at every request of a push, once or for good; two pushes at once",
        "the old state or the new one, never a mix; pushing again completes; no secrets, logs or checkpoints in it",
        does="pushes what is on a list of file names in one commit, on the commit that it has seen",
        says="`… cannot be reached: …. Nothing of this push is in owner/name`",
        then="push again",
        tests=(
            PUSH + "test_a_connection_that_breaks_leaves_the_old_state_or_the_new_one",
            PUSH + "test_of_two_pushes_at_once_the_later_one_is_told",
            PUSH + "test_a_text_that_holds_a_token_is_not_pushed",
            PUSH + "test_weights_whose_upload_breaks_leave_the_model_as_it_was",
            PUSH + "test_a_data_set_whose_upload_breaks_stays_as_it_was",
        ),
        slow=True,
    ),
    Fault(
        33,
        "space-bombs",
        "C",
        "PNGs of 26 to 196 million pixels in some kB, as uploads, data URLs and on the canvas; GIF, TIFF, SVG, EPS, HTML",
        "24 million pixels work, the rest is refused in words; memory rises by less than 300 MB",
        does="judges a header before it decodes, takes three formats and uploads only",
        says="`This picture is too large: at most 25 million pixels, please.`",
        then="make the picture smaller, as JPEG, PNG or WebP",
        tests=(
            UPLOADS + "test_a_bomb_is_refused_by_its_header",
            UPLOADS + "test_other_formats_are_refused_under_any_name",
            SERVER + "test_a_picture_of_24_million_pixels_works_in_bounded_memory",
            SERVER + "test_bombs_are_refused_with_a_plain_message_in_bounded_memory",
            SERVER + "test_a_bomb_in_a_data_url_is_refused_unread",
            SERVER + "test_the_canvas_refuses_bombs_and_data_urls_too",
            SERVER + "test_what_is_no_picture_is_refused_and_never_shown_as_a_page",
            SERVER + "test_pictures_in_other_formats_are_refused",
        ),
        slow=True,
    ),
    Fault(
        34,
        "space-disclosure",
        "C",
        "paths, addresses, traversal, file routes, monitoring, unknown endpoints, EXIF of the sender",
        "no content, no path, no traceback comes out",
        does="serves its examples and results only, answers with words of its own",
        says="`403`, `404`, or one sentence",
        then="nothing",
        tests=(
            SERVER + "test_paths_and_addresses_are_no_pictures",
            SERVER + "test_files_of_the_machine_are_not_served",
            SERVER + "test_monitoring_and_unknown_endpoints_are_closed",
            SERVER + "test_what_the_picture_says_of_its_owner_does_not_come_out",
            SERVER + "test_only_the_two_endpoints_are_offered",
            UPLOADS + "test_strange_file_names_are_not_repeated",
        ),
        slow=True,
    ),
    Fault(
        35,
        "space-flood",
        "C",
        "50 requests at once, long and undeclared bodies, slow and broken-off clients, a disk filled by uploads",
        "503 beyond the queue, 413 for long bodies, old uploads deleted, and it recovers",
        does="works on one picture at a time, bounds queue, bodies and the life of files",
        says="`503` Queue is full, `413` too large",
        then="try again",
        tests=(
            SERVER + "test_long_bodies_are_refused_declared_or_not",
            SERVER + "test_a_flood_meets_a_bounded_queue_and_the_space_recovers",
            SERVER + "test_recordings_of_strangers_are_not_processed",
            UPLOADS + "test_longer_bodies_are_refused_whether_they_say_so_or_not",
            "space/test_space_patience.py::test_35_clients_that_hang_up_and_slow_ones_stop_nobody",
            "space/test_space_patience.py::test_35_old_uploads_are_deleted",
        ),
        slow=True,
    ),
    Fault(
        36,
        "pipeline-parity",
        "D",
        "batches of 1 and 4, padding, path, bytes, array and address, pictures of 1x1 and 1x5000 pixels",
        "the same masks; what is wrong is said in one sentence",
        does="batches pictures that are padded alike",
        says="what came and what was expected",
        then="nothing",
        tests=(
            PIPELINE + "test_masks_do_not_depend_on_the_batch_and_its_padding",
            PIPELINE + "test_path_bytes_array_tensor_and_record_are_the_same_image",
            PIPELINE + "test_url",
            PIPELINE + "test_what_is_wrong_is_said",
            "space/test_space_segmenter.py::test_thin_pictures_are_pictures",
            NEW + "test_thin_pictures.py::test_36_thin_pictures_have_masks_of_their_size",
        ),
    ),
)
