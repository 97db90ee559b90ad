import subprocess, shutil, sys
B="/tmp/w/brk/"
breaks=[
 ("samr1_mini/policy.py","except (RuntimeError, ValueError) as error:\n            raise UserError(f\"adapter","except (KeyError,) as error:\n            raise UserError(f\"adapter","tests/test_evaluation.py::test_an_adapter_without_weights_or_of_another_base_and_damaged_settings_are_one_line"),
 ("samr1_mini/config.py","except (ValueError, AttributeError) as error:\n        raise UserError(f\"{file} cannot","except KeyError as error:\n        raise UserError(f\"{file} cannot","tests/test_evaluation.py::test_an_adapter_without_weights_or_of_another_base_and_damaged_settings_are_one_line"),
 ("eval.py",'("adapter_config.json", "adapter_model.safetensors")','("adapter_config.json",)',"tests/test_evaluation.py::test_an_adapter_without_weights_or_of_another_base_and_damaged_settings_are_one_line"),
 ("eval.py","except (UserError, OSError) as error:","except UserError as error:","tests/test_evaluation.py::test_a_disk_that_is_full_ends_in_one_line"),
 ("train.py","except (UserError, OSError) as error:","except UserError as error:","tests/test_evaluation.py::test_a_disk_that_is_full_ends_in_one_line"),
 ("samr1_mini/tiny/pretrain.py",'            (work / f"{stage}.pt").unlink(missing_ok=True)','            pass',"tests/test_pretrain.py::test_a_command_that_is_done_begins_anew_the_next_time_and_one_that_was_cut_does_not"),
 ("samr1_mini/tiny/pretrain.py",'except (RuntimeError, SafetensorError) as error:','except RuntimeError as error:',"tests/test_pretrain.py::test_what_is_left_by_another_network_or_damaged_is_one_line_that_names_the_file"),
 ("samr1_mini/tiny/pretrain.py",'except (RuntimeError, ValueError) as error:','except KeyError as error:',"tests/test_pretrain.py::test_what_is_left_by_another_network_or_damaged_is_one_line_that_names_the_file"),
 ("samr1_mini/tiny/pretrain.py",'strangers = scenes_from(3 * 10**7','strangers = scenes_from(2 * 10**7',"tests/test_pretrain.py::test_pictures_and_the_scenes_that_answers_go_astray_to_are_other_ones tests/test_pretrain.py::test_what_is_told_stands_under_the_picture_of_another_scene"),
 ("samr1_mini/tiny/pretrain.py",'(listing, True), (named, False),\n','(listing, True), (named, True),\n',"tests/test_pretrain.py::test_an_answer_that_goes_astray_learns_lists_of_its_picture_and_the_box_of_what_it_named_and_no_conclusion"),
 ("samr1_mini/tiny/pretrain.py",'answer_parts(thing, scene, rng, slack, style, question)\n    return','answer_parts(thing, other, rng, slack, style, question)\n    return',"tests/test_pretrain.py::test_an_answer_that_goes_astray_learns_lists_of_its_picture_and_the_box_of_what_it_named_and_no_conclusion"),
 ("tutorials/ablations.py",'sys.exit("holds','sys.exit("holds',""),
]
for f,a,b,t in breaks:
    if not t: continue
    s=open(B+f).read(); assert s.count(a)>=1,(f,a)
    open(B+f,'w').write(s.replace(a,b,1))
    r=subprocess.run(["/tmp/w/venv/bin/python","-m","pytest","-q","-x","-p","no:cacheprovider",*t.split()],cwd=B,capture_output=True,text=True)
    print("FAILS" if r.returncode==1 else f"!!! rc {r.returncode}",f,a[:50],'|',r.stdout.strip().splitlines()[-1][:120],flush=True)
    open(B+f,'w').write(s)
