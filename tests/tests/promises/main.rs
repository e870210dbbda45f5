//! End-to-end tests: a file is a promise. All are one executable, since each that is linked costs more than what is in it.

mod a_full_cluster_is_shared;
mod a_lost_engine_loses_no_answer;
mod a_slow_decode_node_stalls_nobody;
mod abort_in_any_state_frees_everything;
mod an_answer_goes_on_after_a_failure;
mod bad_input_is_refused;
mod clients_of_others_work_unchanged;
mod decode_nodes_keep_what_prompts_share;
mod discovery_recovers;
mod every_process_counts_what_it_did;
mod guides_cannot_hurt;
mod nodes_may_say_anything;
mod one_trace_runs_through_all_processes;
mod openai_clients_get_what_they_know;
mod processes_survive;
mod prompts_take_turns;
mod prompts_that_begin_alike_share_their_cache;
mod same_words_everywhere;
mod several_decode_models_share_a_prefill_pool;
mod slow_clients_keep_nobody_out;
mod the_client_chooses_who_writes;
mod the_default_pair_answers;
mod the_front_door_speaks_openai_and_grpc;
mod the_load_tester_counts_everything;
mod the_same_words_through_every_door;
mod training_and_serving_measure_the_same_loss;
